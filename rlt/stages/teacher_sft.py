"""`rlt stage=teacher_sft`: the teacher's warm-up, on problems that carry an explanation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rlt.data.problem import Problem
from rlt.data.renderer import Renderer
from rlt.llm.adapters import Adapter
from rlt.llm.model_sources import ModelSource
from rlt.stages.examples import teacher_examples
from rlt.stages.stage import Role
from rlt.stages.training import ExplainedStage
from rlt.training import Example


@dataclass(kw_only=True)
class TeacherSFT(ExplainedStage):
    """Fine-tunes a teacher on the data's own explanations."""

    teacher: ModelSource
    teacher_path: str | None
    adapter: Adapter

    name: ClassVar[str] = "teacher_sft"
    trains: ClassVar[Role | None] = "teacher"
    renders_for: ClassVar[Role] = "teacher"
    card: ClassVar[str | None] = (
        "A teacher after its warm-up: it is shown a question and its solution, and writes the "
        "explanation."
    )

    def examples(self, problems: Sequence[Problem], renderer: Renderer) -> list[Example]:
        return teacher_examples(problems, renderer)
