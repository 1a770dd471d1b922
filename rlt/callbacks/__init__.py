"""Lightning callbacks: resumable checkpoints, progress without a terminal."""

from rlt.callbacks.checkpoint import Checkpoint, latest_checkpoint
from rlt.callbacks.lines import ProgressLines

__all__ = ["Checkpoint", "ProgressLines", "latest_checkpoint"]
