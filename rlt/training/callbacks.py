"""Lightning callbacks: resumable checkpoints, progress without a terminal, a watch over hacking."""

from rlt.training.checkpoint_callback import Checkpoint
from rlt.training.hacking_monitor import HackingMonitor
from rlt.training.progress_lines import ProgressLines

__all__ = ["Checkpoint", "HackingMonitor", "ProgressLines"]
