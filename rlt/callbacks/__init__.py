"""Lightning callbacks: resumable checkpoints, progress without a terminal, a watch over hacking."""

from rlt.callbacks.checkpoint import Checkpoint
from rlt.callbacks.hacking import HackingMonitor
from rlt.callbacks.lines import ProgressLines

__all__ = ["Checkpoint", "HackingMonitor", "ProgressLines"]
