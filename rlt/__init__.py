"""Reinforcement-Learned Teachers (arXiv 2506.08388), assembled from Hydra config groups."""

from pathlib import Path

__version__ = "0.1.0"

# An ordinary install carries conf/ inside the package; in a checkout it lies beside it.
PACKAGE_DIR = Path(__file__).resolve().parent
