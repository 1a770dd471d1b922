"""An arm of a study: the same job under several seeds, what it scored, and against another arm."""

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
from rlt.report.jobs import Job


@dataclass
class Cell:
    """One arm under one seed.

    Args:
        step: what it is judged by: an evaluation; where a metric was named, the job's last step.
        metric: the name of that metric, None for accuracy.
    """

    job: Job
    step: Step
    metric: str | None = None

    @cached_property
    def steps(self) -> list[Step]:
        """The step and what led to it, in order; of old runs, all that came before it."""
        names = [step.name for step in self.job.steps]
        before = self.job.steps[: names.index(self.step.name) + 1]
        if self.step.inputs is None:
            return before
        wanted = {self.step.name}
        for step in reversed(before):
            wanted |= set(step.inputs or ()) if step.name in wanted else set()
        return [step for step in before if step.name in wanted]

    def last(self, stage: str) -> Step | None:
        """The last step of a stage among them."""
        return next((step for step in reversed(self.steps) if step.stage == stage), None)

    @property
    def answers(self) -> list[AnswerRecord]:
        """The graded answers of the step, one for each sampled answer."""
        return self.step.run.answers

    @cached_property
    def shares_P(self) -> np.ndarray:
        """Share of right answers of each question."""
        return avg_at_k_per_question(correct_matrix(self.answers))

    @property
    def score(self) -> float | None:
        """What the arm is ranked by; None if the job has no such metric."""
        if self.metric is None:
            return float(self.shares_P.mean())
        value = self.job.run.metrics.get(self.metric)
        return None if value is None else float(value)


@dataclass
class Arm:
    """Cells that differ in their seed alone; none where every job of the arm failed."""

    name: str
    overrides: dict[str, str] = field(default_factory=dict)  # swept key → value
    cells: dict[int, Cell] = field(default_factory=dict)

    @cached_property
    def scores(self) -> dict[int, float]:
        """Seed → score, of the cells that have one."""
        scores = {seed: cell.score for seed, cell in sorted(self.cells.items())}
        return {seed: score for seed, score in scores.items() if score is not None}

    @cached_property
    def interval(self) -> Interval:
        """Over seeds where there are several, else of accuracy over questions; else NaN."""
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
        """What it is an interval over; empty if there is none."""
        if math.isnan(self.interval.low):
            return ""
        return "seeds" if len(self.scores) > 1 else "questions"

    @property
    def first(self) -> Cell:
        """The cell of the lowest seed."""
        return self.cells[min(self.cells)]


@dataclass(frozen=True)
class Difference:
    """`reference` minus `other`, over the seeds (or questions) that both have."""

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
    """By seed where both have several in common; accuracies of one seed by question; else None."""
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
