"""Lightning modules: teacher RL, and the SFT that pretraining, warm-up and distillation share."""

from rlt.modules.sft import SFT, Example
from rlt.modules.teacher_rl import TeacherRL

__all__ = ["SFT", "Example", "TeacherRL"]
