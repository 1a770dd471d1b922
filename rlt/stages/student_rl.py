"""`rlt stage=student_rl`: a student learns by RL to answer right; a verifier is its reward.

What teaching is compared with, and what may come after it: the paper starts such RL from students
that a teacher has taught (its "cold start").
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from rlt.data.problem import Problem
from rlt.data.renderer import Renderer
from rlt.llm.model_sources import ModelSource
from rlt.llm.models import context_tokens
from rlt.llm.shared_weights import frozen_copy
from rlt.runs.folder import RunFolder
from rlt.stages.common import load_data
from rlt.stages.rl import RLStage, record_weights, require_room
from rlt.stages.stage import Role
from rlt.training import Answering


@dataclass(kw_only=True)
class StudentRL(RLStage):
    """RL of a student, rewarded by the data's grader."""

    student: ModelSource
    student_path: str | None
    missing_answer_penalty: float

    name: ClassVar[str] = "student_rl"
    trains: ClassVar[Role | None] = "student"
    writer: ClassVar[Role | None] = "student"
    card: ClassVar[str | None] = "A student after RL with verified answers as reward."

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.grader is None:
            raise ValueError("student RL verifies answers: set data.grader (it is null)")

    def run(self, run: RunFolder) -> dict[str, float]:
        grader = self.data.grader
        assert grader is not None
        renderer = self.load_renderer()
        task = Answering(renderer, grader, self.missing_answer_penalty)
        split = load_data(self.data, renderer)
        run.record(data=split.report)
        datamodule = self.batches_of(split.train, split.validation)
        student = self.load_policy()
        contexts = {"student": context_tokens(student.model)}
        self.check_lengths(contexts, split.train + split.validation, renderer)
        needs_reference = self.algorithm.needs_reference
        moves = self.algorithm.reference_update_every_steps is not None
        reference = frozen_copy(student.model, moves) if needs_reference else None
        record_weights(run, {"student": student.model, "reference": reference})
        with grader:
            return self.fit(run, renderer, student, reference, task, datamodule)

    def check_lengths(
        self, contexts: Mapping[str, int], problems: Sequence[Problem], renderer: Renderer
    ) -> None:
        if contexts:
            require_room(
                contexts["student"], problems, lambda p: len(renderer.student_prompt(p)),
                self.rollout.max_new_tokens, "answer", "student",
            )  # fmt: skip
