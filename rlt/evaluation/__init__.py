"""Evaluation: answers, their graders, benchmarks, and the statistics of their results."""
