"""Evaluation: benchmarks, graders of answers, and statistics of what was measured."""
