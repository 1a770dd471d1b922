"""`rlt stage=teacher_sft`: the teacher's warm-up, on problems that carry an explanation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rlt.data.dataset import ProblemData
from rlt.data.problem import Problem
from rlt.data.renderer import Renderer
from rlt.llm.model_sources import ModelSource
from rlt.runs.folder import RunFolder
from rlt.stages.common import load_data
from rlt.stages.examples import require_explanations, teacher_examples, without_explanation
from rlt.stages.stage import Inputs, Role
from rlt.stages.training import SFTStage
from rlt.training import Example


@dataclass(kw_only=True)
class TeacherSFT(SFTStage):
    """Fine-tunes a teacher on the data's own explanations."""

    teacher: ModelSource
    teacher_path: str | None
    data: ProblemData

    trains: ClassVar[Role | None] = "teacher"
    renders_for: ClassVar[Role] = "teacher"
    card: ClassVar[str | None] = (
        "A teacher after its warm-up: it is shown a question and its solution, and writes the "
        "explanation."
    )

    def run(self, run: RunFolder) -> dict[str, float]:
        renderer = self.load_renderer()
        split = load_data(self.data, renderer)
        run.record(data=split.report | {"without_explanation": without_explanation(split.train)})
        require_explanations(split.train)
        train, validation = (
            self.examples(problems, renderer) for problems in (split.train, split.validation)
        )
        return self.fit(run, renderer, train, validation)

    def examples(self, problems: Sequence[Problem], renderer: Renderer) -> list[Example]:
        return teacher_examples(problems, renderer)

    def read(self, renderer: Renderer | None) -> Inputs:
        inputs = super().read(renderer)
        require_explanations(inputs.problems or [])
        return inputs
