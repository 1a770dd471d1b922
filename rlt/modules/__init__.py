"""Lightning modules: RL of teachers and students, SFT for pretraining, warm-up and distillation."""

from rlt.modules.rl import RL
from rlt.modules.sft import SFT, Example
from rlt.modules.tasks import Answering, Teaching

__all__ = ["RL", "SFT", "Answering", "Example", "Teaching"]
