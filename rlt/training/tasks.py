"""What a policy is rewarded for: explaining (teacher RL) or answering (student RL).

A task gives `RL` its prompts and judges what was written. Everything else (rollouts, advantages,
losses, logs) is the same for both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from rlt.data.problem import Problem
from rlt.data.renderer import Renderer
from rlt.evaluation.answers import extract_answer
from rlt.llm.batching import Row
from rlt.rewards import RewardScorer, RewardTable, ScoredExplanation
from rlt.rewards.attribution import attribution
from rlt.rewards.monitors import early_excess, rotated


class Written(Protocol):
    """One scored completion: its problem, its text, what of it is a thought, and whether it was
    brought to its end.
    """

    @property
    def problem(self) -> Problem: ...
    @property
    def text(self) -> str: ...
    @property
    def thought(self) -> str: ...
    @property
    def closed(self) -> bool: ...


class Task(Protocol):
    """Prompts of a policy, and rewards of its completions.

    Attributes:
        kind: how samples call a completion's text.
        stop: text after which a completion ends.
        scoring_model: a frozen model that judging runs, or None.
    """

    kind: str
    stop: str
    scoring_model: PreTrainedModel | None

    def prompt(self, problem: Problem) -> list[int]: ...

    def score(
        self,
        policy: Any,
        problems: Sequence[Problem],
        rows: Sequence[Row],
        log_probs: Sequence[Tensor],
        temperature: float,
    ) -> tuple[list[Any], RewardTable]:
        """N completions scored, each a `Written`, and their rewards.

        Args:
            rows: prompt and completion of each.
            log_probs: of the completions' tokens under the policy, at `temperature`.
        """
        ...

    def monitor(self, scored: Sequence[Any], group_size: int) -> dict[str, float]:
        """What tells that this task's reward is being hacked."""
        ...

    def details(
        self, scored: Any, table: RewardTable, n: int, advantages_T: Tensor
    ) -> dict[str, Any]:
        """What else a sample of completion n shows."""
        ...


class Teaching:
    """The policy is a teacher; a student's log-probs are its reward (arXiv 2506.08388)."""

    kind = "explanation"

    def __init__(self, renderer: Renderer, scorer: RewardScorer) -> None:
        self.renderer = renderer
        self.scorer = scorer
        self.stop = renderer.stop
        self.scoring_model: PreTrainedModel | None = scorer.student

    def prompt(self, problem: Problem) -> list[int]:
        return self.renderer.teacher_prompt(problem)

    def score(
        self,
        policy: Any,
        problems: Sequence[Problem],
        rows: Sequence[Row],
        log_probs: Sequence[Tensor],
        temperature: float,
    ) -> tuple[list[ScoredExplanation], RewardTable]:
        if self.scorer.temperature != temperature:  # reward.temperature
            log_probs = self.scorer.row_log_probs(policy, rows)
        scored = [
            ScoredExplanation(problem, self.renderer.explanation(ids), prompt, values)
            for problem, (prompt, ids), values in zip(problems, rows, log_probs, strict=True)
        ]
        return scored, self.scorer(scored, teacher=policy)

    def details(
        self, scored: ScoredExplanation, table: RewardTable, n: int, advantages_T: Tensor
    ) -> dict[str, Any]:
        return {"attribution": attribution(self.renderer, scored, table.scores[n], advantages_T)}

    def monitor(self, scored: Sequence[ScoredExplanation], group_size: int) -> dict[str, float]:
        """Leaks over all completions; what the first of each problem really adds for the student.

        The student's log-prob of the solution after the explanation, less that after none, and
        less that after the next problem's; the last two need two problems at least.
        """
        solutions = [one.problem.solution for one in scored]
        texts = [one.text for one in scored]
        firsts = scored[::group_size]
        problems = [one.problem for one in firsts]
        thoughts = [one.explanation.ids for one in firsts]

        def solution_log_prob(thoughts: Sequence[Sequence[int]]) -> float:
            values = self.scorer.solution_log_probs(problems, thoughts)
            return fmean(float(one.mean()) for one in values)

        own = solution_log_prob(thoughts)
        values = {"gain_over_empty": own - solution_log_prob([[]] * len(problems))}
        if len(problems) > 1:
            values["gain_over_swapped"] = own - solution_log_prob(rotated(thoughts))
            values["solution_early_excess"] = early_excess(solutions, texts, group_size)
        return values


@dataclass(frozen=True)
class GradedAnswer:
    """What a student wrote after its opening thought tag; closed if it holds an answer."""

    problem: Problem
    text: str
    thought: str
    closed: bool


class Answering:
    """The policy is a student; a verifier's verdict on its answer is its reward.

    Args:
        grader: judges answers; right is 1, anything else 0.
        missing_answer_penalty: subtracted where there is no answer to judge.

    Raises:
        ValueError: there is no grader, or the penalty is negative.
    """

    kind = "completion"
    scoring_model: PreTrainedModel | None = None

    def __init__(
        self, renderer: Renderer, grader: Any, missing_answer_penalty: float = 0.0
    ) -> None:
        if grader is None:
            raise ValueError("student RL verifies answers: set data.grader (it is null)")
        if missing_answer_penalty < 0:
            raise ValueError(
                f"missing_answer_penalty={missing_answer_penalty} must not be negative: it is "
                "subtracted"
            )
        self.renderer = renderer
        self.grader = grader
        self.missing_answer_penalty = missing_answer_penalty
        self.tags = renderer.style.tags["solution_open"], renderer.style.tags["solution_close"]
        self.stop = self.tags[1]

    def prompt(self, problem: Problem) -> list[int]:
        return self.renderer.student_prompt(problem)

    def score(
        self,
        policy: Any,
        problems: Sequence[Problem],
        rows: Sequence[Row],
        log_probs: Sequence[Tensor],
        temperature: float,
    ) -> tuple[list[GradedAnswer], RewardTable]:
        texts = [self.renderer.decode(ids) for _, ids in rows]
        found = [extract_answer(text, *self.tags) for text in texts]
        answers = [answer if answer and answer.strip() else None for answer in found]
        graded = iter(
            self.grader.grade_all(
                [(p, a) for p, a in zip(problems, answers, strict=True) if a is not None]
            )
        )
        correct = [0.0 if a is None else float(next(graded).correct) for a in answers]
        penalties = [self.missing_answer_penalty if a is None else 0.0 for a in answers]
        rewards = [c - p for c, p in zip(correct, penalties, strict=True)]
        end = self.renderer.style.tags["thought_close"]
        written = [
            GradedAnswer(problem, text, text.partition(end)[0].strip(), answer is not None)
            for problem, text, answer in zip(problems, texts, answers, strict=True)
        ]
        terms = {"answer/correct": correct, "answer/missing_penalty": penalties}
        table = RewardTable(rewards, terms)
        table.require_finite([problem.id for problem in problems])
        return written, table

    def monitor(self, scored: Sequence[GradedAnswer], group_size: int) -> dict[str, float]:
        return {}

    def details(
        self, scored: GradedAnswer, table: RewardTable, n: int, advantages_T: Tensor
    ) -> dict[str, Any]:
        return {}
