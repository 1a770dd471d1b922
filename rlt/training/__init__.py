"""Lightning modules: RL of teachers and students, SFT for pretraining, warm-up and distillation."""

from rlt.training.rl import RL
from rlt.training.sft import SFT, Example
from rlt.training.tasks import Answering, Teaching

__all__ = ["RL", "SFT", "Answering", "Example", "Teaching"]
