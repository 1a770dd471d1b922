"""What a policy is rewarded for: explaining (teacher RL) or answering (student RL).

A task gives `RL` its prompts and judges what was written. Everything else (rollouts, advantages,
losses, logs) is the same for both.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any, Protocol

from transformers import PreTrainedModel

from rlt.data.grader import Grader
from rlt.data.problem import Problem
from rlt.data.renderer import Explanation, Renderer
from rlt.evaluation.answers import extract_answer
from rlt.rewards import RewardScorer, RewardTable, ScoredExplanation
from rlt.rewards.attribution import attribution
from rlt.rewards.monitors import early_excess, rotated
from rlt.training.rollout_batch import ParsedCompletion, RolloutBatch


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

    def prompt(self, problem: Problem) -> list[int]:
        """Token ids that the policy continues."""
        ...

    def parse(self, ids: Sequence[int]) -> ParsedCompletion:
        """What the token ids of a completion say."""
        ...

    def score(
        self, rollout: RolloutBatch, policy: PreTrainedModel, temperature: float
    ) -> RewardTable:
        """Rewards of the N completions.

        Args:
            rollout: sampled completions with the policy's log-probs.
            policy: the model that sampled them.
            temperature: at which the rollout's log-probs were taken.

        Raises:
            NotFiniteError: a reward or one of its terms is NaN or infinite.
        """
        ...

    def monitor(self, rollout: RolloutBatch) -> dict[str, float]:
        """Numbers that tell whether this task's reward is being hacked."""
        ...

    def details(self, rollout: RolloutBatch, n: int) -> dict[str, Any]:
        """What else a sample of completion n shows."""
        ...


class Teaching:
    """The policy is a teacher; a student's log-probs are its reward (arXiv 2506.08388).

    Args:
        renderer: prompts of teacher and student.
        scorer: rewards explanations with a frozen student.
    """

    kind = "explanation"

    def __init__(self, renderer: Renderer, scorer: RewardScorer) -> None:
        self.renderer = renderer
        self.scorer = scorer
        self.stop = renderer.stop
        self.scoring_model: PreTrainedModel | None = scorer.student

    def prompt(self, problem: Problem) -> list[int]:
        """Token ids of the teacher's prompt: question and solution."""
        return self.renderer.teacher_prompt(problem)

    def parse(self, ids: Sequence[int]) -> ParsedCompletion:
        """The explanation up to its end tag."""
        found = self.renderer.explanation(ids)
        return ParsedCompletion(found.ids, found.text, found.text, found.end_tag_found)

    def score(
        self, rollout: RolloutBatch, policy: PreTrainedModel, temperature: float
    ) -> RewardTable:
        """Rewards of the explanations, by one forward of the student (see `Task.score`).

        The policy's log-probs are taken again where the reward has a temperature of its own.
        """
        log_probs = rollout.log_probs
        if self.scorer.temperature != temperature:  # reward.temperature
            log_probs = self.scorer.row_log_probs(policy, rollout.rows)
        explanations = [
            ScoredExplanation(
                problem, Explanation(list(parsed.ids), parsed.text, parsed.closed), prompt, values
            )
            for problem, parsed, prompt, values in zip(
                rollout.problems, rollout.parsed, rollout.prompts, log_probs, strict=True
            )
        ]
        return self.scorer(explanations, teacher=policy)

    def details(self, rollout: RolloutBatch, n: int) -> dict[str, Any]:
        """Token by token, what made the reward and what came of it."""
        return {
            "attribution": attribution(
                self.renderer,
                rollout.problems[n],
                rollout.parsed[n].ids,
                rollout.reward_table.scores[n],
                rollout.advantages_NT[n],
            )
        }

    def monitor(self, rollout: RolloutBatch) -> dict[str, float]:
        """Leaks over all completions; what the first of each problem really adds for the student.

        The latter is the student's mean log-prob of the solution (nats a token) after the
        explanation, less that after none, and less that after the next problem's explanation. The
        second difference and the leaks need two problems at least.
        """
        firsts = range(0, len(rollout), rollout.group_size)
        problems = [rollout.problems[n] for n in firsts]
        thoughts = [rollout.parsed[n].ids for n in firsts]

        def solution_log_prob(thoughts: Sequence[Sequence[int]]) -> float:
            values = self.scorer.solution_log_probs(problems, thoughts)
            return fmean(float(one.mean()) for one in values)

        own = solution_log_prob(thoughts)
        values = {"gain_over_empty": own - solution_log_prob([[]] * len(problems))}
        if len(problems) > 1:
            values["gain_over_swapped"] = own - solution_log_prob(rotated(thoughts))
            solutions = [problem.solution for problem in rollout.problems]
            texts = [parsed.text for parsed in rollout.parsed]
            values["solution_early_excess"] = early_excess(solutions, texts, rollout.group_size)
        return values


class Answering:
    """The policy is a student; a verifier's verdict on its answer is its reward.

    Args:
        renderer: prompts of the student.
        grader: judges answers; a right one is worth 1, any other 0.
        missing_answer_penalty: subtracted where there is no answer to judge.

    Raises:
        ValueError: there is no grader, or the penalty is negative.
    """

    kind = "completion"
    scoring_model: PreTrainedModel | None = None

    def __init__(
        self, renderer: Renderer, grader: Grader | None, missing_answer_penalty: float = 0.0
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
        """Token ids of the student's prompt: the question."""
        return self.renderer.student_prompt(problem)

    def parse(self, ids: Sequence[int]) -> ParsedCompletion:
        """What follows the opening thought tag; it is closed if it holds an answer."""
        text = self.renderer.decode(ids)
        thought = text.partition(self.renderer.style.tags["thought_close"])[0].strip()
        return ParsedCompletion(ids, text, thought, self._answer(text) is not None)

    def score(
        self, rollout: RolloutBatch, policy: PreTrainedModel, temperature: float
    ) -> RewardTable:
        """Verdicts on the answers, less the penalty for missing ones (see `Task.score`)."""
        answers = [self._answer(parsed.text) for parsed in rollout.parsed]
        graded = iter(
            self.grader.grade_all(
                [(p, a) for p, a in zip(rollout.problems, answers, strict=True) if a is not None]
            )
        )
        correct = [0.0 if a is None else float(next(graded).correct) for a in answers]
        penalties = [self.missing_answer_penalty if a is None else 0.0 for a in answers]
        rewards = [c - p for c, p in zip(correct, penalties, strict=True)]
        terms = {"answer/correct": correct, "answer/missing_penalty": penalties}
        table = RewardTable(rewards, terms)
        table.require_finite(rollout.problem_ids)
        return table

    def monitor(self, rollout: RolloutBatch) -> dict[str, float]:
        """No monitors of its own."""
        return {}

    def details(self, rollout: RolloutBatch, n: int) -> dict[str, Any]:
        """No details beyond the reward terms."""
        return {}

    def _answer(self, text: str) -> str | None:
        found = extract_answer(text, *self.tags)
        return found if found and found.strip() else None
