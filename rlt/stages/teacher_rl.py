"""`rlt stage=teacher_rl`: the teacher learns to write what teaches its student best.

The student in the reward is the reference model (`reward_student=reference`, as the published
code has it) or `model@student`. Weights that are the same are in memory once.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from transformers import PreTrainedModel

from rlt.config.allowed_targets import raise_if_any
from rlt.data.problem import Problem
from rlt.data.renderer import Renderer
from rlt.llm.device import on_device
from rlt.llm.model_sources import ModelSource
from rlt.llm.models import LanguageModel, context_tokens, fingerprint, freeze
from rlt.llm.shared_weights import frozen_copy, share_equal_weights
from rlt.report.results import rl_result
from rlt.rewards import Reward, RewardScorer
from rlt.rewards.preflight import Area, Preflight
from rlt.runs import ranks
from rlt.runs.files import read_json
from rlt.runs.folder import RunFolder
from rlt.stages.common import load_data, require_same_tokenizer
from rlt.stages.preflight import PREFLIGHT_FILE, metrics_of, preflight_areas, tell_areas
from rlt.stages.rl import RLStage, record_weights, require_room
from rlt.stages.stage import Role
from rlt.training import Teaching
from rlt.training.credit import Credit

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TeacherRL(RLStage):
    """RL of a teacher, rewarded by what its explanations do for a student."""

    teacher: ModelSource
    teacher_path: str | None
    student: ModelSource | None
    student_path: str | None
    reward: Reward
    credit: Credit
    reward_student: Literal["reference", "student"]
    preflight: Preflight | None

    name: ClassVar[str] = "teacher_rl"
    trains: ClassVar[Role | None] = "teacher"
    writer: ClassVar[Role | None] = "teacher"
    renders_for: ClassVar[Role] = "teacher"
    leaves: ClassVar[tuple[str, ...]] = (*RLStage.leaves, "preflight.json")
    card: ClassVar[str | None] = (
        "A Reinforcement-Learned Teacher (arXiv 2506.08388): it is shown a question and its "
        "solution, and writes the explanation that best teaches a student."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        errors = self._student_errors() + credit_errors(self.credit, self.reward)
        if self.reward.correctness is not None and self.data.grader is None:
            errors.append("this reward verifies answers: set data.grader (it is null)")
        raise_if_any(errors)

    @classmethod
    def settle(cls, step: Any) -> None:
        """Take the pipeline's student out of a step's config that does not use it."""
        if step.reward_student == "reference":
            step.student = step.student_path = None

    def _student_errors(self) -> list[str]:
        """Where `reward_student` and `model@student` contradict each other."""
        if self.reward_student == "student":
            missing = self.student is None
            return ["reward_student=student needs a student: set model@student=…"] * missing
        if self.student is not None:
            return [
                "model@student is set, but reward_student=reference does not use it; set "
                "reward_student=student, or leave model@student out"
            ]
        if self.student_path is not None:
            return [
                f"student_path={self.student_path} is not used with reward_student=reference; set "
                "reward_student=student and model@student, or leave it out"
            ]
        return []

    def run(self, run: RunFolder) -> dict[str, float]:
        renderer = self.load_renderer()
        if (student_source := self.source("student")) is not None:
            require_same_tokenizer(renderer.tokenizer, student_source.tokenizer())
        split = load_data(self.data, renderer)
        run.record(data=split.report)
        datamodule = self.batches_of(split.train, split.validation)
        teacher = self.load_policy()
        reference, student = self.frozen_models(teacher)
        contexts = {"teacher": context_tokens(teacher.model), "student": context_tokens(student)}
        self.check_lengths(contexts, split.train + split.validation, renderer)
        record_weights(run, {"teacher": teacher.model, "reference": reference, "student": student})
        scorer = RewardScorer(
            self.reward,
            student,
            renderer,
            temperature=self.rollout.temperature or 1.0,
            token_budget=self.hardware.micro_batch_tokens,
            grader=self.data.grader,
            keep_hidden=self.credit.exact,
        )
        areas = self.run_preflight(run, split.train, scorer)
        task = Teaching(renderer, scorer)
        return areas | self.fit(run, renderer, teacher, reference, task, datamodule, self.credit)

    def frozen_models(
        self, teacher: LanguageModel
    ) -> tuple[PreTrainedModel | None, PreTrainedModel]:
        """(reference or None, student of the reward), sharing one object where they may."""
        moves = self.algorithm.reference_update_every_steps is not None
        reference = frozen_copy(teacher.model, moves) if self.holds_reference else None
        if self.reward_student == "reference":
            assert reference is not None
            return reference, reference
        student = freeze(self.load_model("student").model)
        if reference is not None and not moves and fingerprint(student) == fingerprint(reference):
            log.info("student and reference have the same weights: kept in memory once")
            return reference, reference
        # Never those of a reference that moves: the student of the reward stays as it is.
        lenders = [teacher.model] if reference is None or moves else [teacher.model, reference]
        if saved := sum(share_equal_weights(student, lender) for lender in lenders):
            log.info("the student shares %.0f MiB of weights", saved / 2**20)
        return reference, student

    def run_preflight(
        self, run: RunFolder, problems: list[Problem], scorer: RewardScorer
    ) -> dict[str, float]:
        """Tell, before the first step, how well the reward tells good explanations from bad.

        The data's own explanations are scored beside damaged copies of them. A run that goes on has
        been told already. Random numbers are left as they were.
        """
        file = run.folder / PREFLIGHT_FILE
        told = ranks.from_main(lambda: read_json(file) if file.is_file() else None, "preflight")
        if told is not None:
            return metrics_of([Area.read(row) for row in told])
        explained = any(problem.explanation is not None for problem in problems)
        if self.preflight is None or not explained:
            return {}
        on_device(scorer.student, self.hardware.device)
        with torch.random.fork_rng():
            areas = preflight_areas(self.preflight, problems, self.data, scorer, self.seed)
        return tell_areas(areas, self.preflight, run.folder)

    # --- what a plan asks ------------------------------------------------------------------------

    @property
    def scores_by(self) -> str | None:
        return "student" if self.student is not None else "teacher"

    @property
    def holds_reference(self) -> bool:
        return super().holds_reference or self.reward_student == "reference"

    def rows(
        self, problems: Sequence[Problem], renderer: Renderer
    ) -> list[tuple[list[int], list[int]]]:
        return [(renderer.teacher_prompt(problem), []) for problem in problems]

    def check_lengths(
        self, contexts: Mapping[str, int], problems: Sequence[Problem], renderer: Renderer
    ) -> None:
        if not contexts:
            return

        def student_tokens(problem: Problem) -> int:
            text = renderer.student_text(problem, [])
            return len(text.prompt) + len(text.continuation)

        teacher = contexts["teacher"]
        new_tokens = self.rollout.max_new_tokens
        require_room(
            teacher, problems, lambda p: len(renderer.teacher_prompt(p)), new_tokens,
            "explanation", "teacher",
        )  # fmt: skip
        student = contexts.get("student", teacher)
        require_room(student, problems, student_tokens, new_tokens, "explanation", "student")

    @staticmethod
    def result(run: Any) -> list[str]:
        return rl_result(run, "closed explanations")


def credit_errors(credit: Credit, reward: Reward) -> list[str]:
    """Where tokens are to be paid for by a reward that has no share for them."""
    by_k1 = reward.is_dense_by_k1_alone and reward.temperature is None
    if credit.exact and reward.credits_tokens and not by_k1:
        return [
            "credit.exact=true takes the place of the sampled log-ratio: it needs a reward whose "
            "only mean over the explanation is thought_kl's with the estimator k1, without "
            "transform, clip and sum, and reward.temperature=null; choose reward=rlt, or "
            "credit.exact=false"
        ]
    if credit.needs_token_rewards and not reward.credits_tokens:
        return [
            "credit=token shares out the part of the reward that is a mean or a sum over the "
            f"explanation's tokens, and this reward has none ({', '.join(reward.terms)}): choose "
            "a reward with thought_kl, such as reward=rlt, or credit=completion"
        ]
    return []
