"""An arm of a study is one job under several seeds. This module scores and compares arms."""

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from rlt.evaluation.benchmark import AnswerRecord, compare_answers, correct_matrix
from rlt.evaluation.statistics import (
    Interval,
    avg_at_k_per_question,
    questions_to_tell_apart,
    share_interval,
    t_interval,
)
from rlt.report.comparison import Step, verdict_of
from rlt.sweeps.jobs import Job


@dataclass
class Cell:
    """One arm under one seed.

    Args:
        step: the step that gives the score. It is an evaluation, or the job's last step where a
            metric is named.
        metric: the name of the metric that gives the score; None means accuracy.
    """

    job: Job
    step: Step
    metric: str | None = None

    @cached_property
    def steps(self) -> list[Step]:
        """The steps that led to this one, and the step itself, in the order of the pipeline.

        Old runs did not record the inputs of a step; then these are all steps before it.
        """
        names = [step.name for step in self.job.steps]
        before = self.job.steps[: names.index(self.step.name) + 1]
        if self.step.inputs is None:
            return before
        wanted = {self.step.name}
        for step in reversed(before):
            wanted |= set(step.inputs or ()) if step.name in wanted else set()
        return [step for step in before if step.name in wanted]

    def last(self, stage: str) -> Step | None:
        """Return the last of `steps` that ran the given stage, or None."""
        return next((step for step in reversed(self.steps) if step.stage == stage), None)

    @property
    def answers(self) -> list[AnswerRecord]:
        """The graded answers of the step, one for each sampled answer."""
        return self.step.run.answers

    @cached_property
    def shares_P(self) -> np.ndarray:
        """Share of right answers to each question, from 0 to 1; shape (questions,)."""
        return avg_at_k_per_question(correct_matrix(self.answers))

    @property
    def score(self) -> float | None:
        """The accuracy or the metric that arms are ranked by; None if the job lacks the metric."""
        if self.metric is None:
            return float(self.shares_P.mean())
        value = self.job.run.metrics.get(self.metric)
        return None if value is None else float(value)


@dataclass
class Arm:
    """Cells that differ only in their seed. There are none if every job of the arm failed."""

    name: str
    overrides: dict[str, str] = field(default_factory=dict)  # swept key → value
    cells: dict[int, Cell] = field(default_factory=dict)

    @cached_property
    def scores(self) -> dict[int, float]:
        """The score of each seed whose cell has one."""
        scores = {seed: cell.score for seed, cell in sorted(self.cells.items())}
        return {seed: score for seed, score in scores.items() if score is not None}

    @cached_property
    def interval(self) -> Interval:
        """The mean score with its 95 % interval.

        With several seeds the interval is over seeds. The accuracy of a single seed has an
        interval over questions. Otherwise both ends are NaN.
        """
        scores = list(self.scores.values())
        if scores and all(map(math.isfinite, scores)):
            if len(scores) > 1:
                return t_interval(scores)
            if self.first.metric is None:
                return share_interval(self.first.shares_P)
        mean = sum(scores) / len(scores) if scores else math.nan
        return Interval(mean, math.nan, math.nan)

    @property
    def interval_over(self) -> str:
        """`seeds` or `questions`, whichever the interval is over; empty if there is no interval."""
        if math.isnan(self.interval.low):
            return ""
        return "seeds" if len(self.scores) > 1 else "questions"

    @property
    def first(self) -> Cell:
        """The cell of the lowest seed."""
        return self.cells[min(self.cells)]


@dataclass(frozen=True)
class Difference:
    """The score of the reference minus that of `other`, over the seeds or questions of both."""

    other: Arm
    interval: Interval
    seeds: int
    wins: int  # seeds in which the reference is ahead
    questions_needed: int | None
    sign: int = 1  # -1 where lower is better

    @property
    def verdict(self) -> str:
        """`better`, `worse` or `within noise`, said of the reference."""
        mean, low, high = self.interval
        return verdict_of(self.interval if self.sign > 0 else Interval(-mean, -high, -low))


def compare_arms(reference: Arm, other: Arm, sign: int = 1) -> Difference | None:
    """Return the difference of two arms, paired by seed if they share several seeds.

    With one common seed, accuracies are paired by question. Metrics of one seed, and arms without a
    common seed, cannot be compared: the result is None.

    Args:
        sign: 1 if a higher score is better, -1 if a lower one is.
    """
    seeds = sorted(
        seed
        for seed in reference.scores.keys() & other.scores.keys()
        if math.isfinite(reference.scores[seed]) and math.isfinite(other.scores[seed])
    )
    differences = [reference.scores[seed] - other.scores[seed] for seed in seeds]
    wins = sum(sign * difference > 0 for difference in differences)
    if len(seeds) > 1:
        return Difference(other, t_interval(differences), len(seeds), wins, None, sign)
    if not seeds or reference.first.metric is not None:
        return None
    a, b = reference.cells[seeds[0]], other.cells[seeds[0]]
    needed = questions_to_tell_apart(a.shares_P, b.shares_P)
    return Difference(other, compare_answers(a.answers, b.answers), 1, wins, needed)
