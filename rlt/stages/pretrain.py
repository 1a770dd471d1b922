"""`rlt stage=pretrain`: a base model from scratch, with the SFT module."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rlt.data.problem import Problem
from rlt.data.renderer import Renderer
from rlt.llm.model_sources import ModelSource
from rlt.stages.examples import student_examples
from rlt.stages.stage import Role
from rlt.stages.training import ExplainedStage
from rlt.training import Example


@dataclass(kw_only=True)
class Pretrain(ExplainedStage):
    """Trains a student from random weights on the data's own explanations."""

    student: ModelSource

    name: ClassVar[str] = "pretrain"
    trains: ClassVar[Role | None] = "student"
    card: ClassVar[str | None] = "A base model, pretrained from scratch on short texts of one task."

    def examples(self, problems: Sequence[Problem], renderer: Renderer) -> list[Example]:
        return student_examples(problems, renderer)
