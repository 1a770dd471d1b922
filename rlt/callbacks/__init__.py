"""Lightning callbacks: resumable checkpoints."""

from rlt.callbacks.checkpoint import Checkpoint, latest_checkpoint

__all__ = ["Checkpoint", "latest_checkpoint"]
