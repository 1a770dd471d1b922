"""Reinforcement-Learned Teachers (arXiv 2506.08388), assembled from Hydra config groups."""

__version__ = "0.1.0"
