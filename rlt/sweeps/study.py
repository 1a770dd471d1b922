"""A study groups runs into arms and ranks the arms.

The jobs of an arm differ only in their seed. An arm is named after the overrides that tell it from
other arms. Where evaluations have different labels, the label is part of the name as well. The
score of an arm is the accuracy of its evaluations, or any final metric.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rlt.config.suggestions import did_you_mean
from rlt.report.comparison import EVALUATE, Step
from rlt.sweeps.arms import Arm, Cell, Difference, compare_arms
from rlt.sweeps.jobs import Job, find_jobs, short_names, swept_keys

EVALUATIONS = ("last", "all")
DIRECTIONS = ("maximize", "minimize")
_NOT_IN_A_NAME = ("arm", "experiment", "stage")  # of an evaluation: its label says more
_SHOWN_NAMES = 12


@dataclass(frozen=True)
class Measure:
    """The score that ranks arms: the accuracy of evaluations, or a final metric of jobs.

    Args:
        metric: a name in metrics.json; None means accuracy.
        direction: `maximize` or `minimize`; None for accuracy.

    Raises:
        ValueError: the direction is unknown, or only one of the two is given.
    """

    metric: str | None = None
    direction: str | None = None

    def __post_init__(self) -> None:
        if self.metric is None and self.direction is not None:
            raise ValueError(
                f"direction={self.direction!r} goes with metric=; without one, arms are ranked by "
                "accuracy, the highest first"
            )
        if self.metric is not None and self.direction not in DIRECTIONS:
            raise ValueError(
                f"direction={self.direction!r}: choose {' or '.join(DIRECTIONS)} for "
                f"metric={self.metric}"
            )

    @property
    def name(self) -> str:
        """The name of the metric; `eval/accuracy` where none was named."""
        return self.metric or "eval/accuracy"

    @property
    def sign(self) -> int:
        """1 where higher is better, -1 where lower is."""
        return -1 if self.direction == "minimize" else 1


@dataclass(frozen=True)
class Study:
    """Jobs, their arms, and the reference that the other arms are compared with."""

    jobs: list[Job]
    every_arm: list[Arm]
    reference: Arm
    measure: Measure

    @property
    def arms(self) -> list[Arm]:
        """The arms with at least one finished job."""
        return [arm for arm in self.every_arm if arm.cells]

    @cached_property
    def ranked(self) -> list[Arm]:
        """Every arm, the best first. Arms without a finite mean come last."""

        def place(arm: Arm) -> tuple[bool, float]:
            mean = arm.interval.mean
            return (False, -self.measure.sign * mean) if math.isfinite(mean) else (True, 0.0)

        return sorted(self.every_arm, key=place)

    @cached_property
    def differences(self) -> dict[str, Difference | None]:
        """Name of an arm → reference minus arm; None if they share too few seeds."""
        return {
            arm.name: compare_arms(self.reference, arm, self.measure.sign)
            for arm in self.arms
            if arm is not self.reference
        }


def read_study(
    runs: Sequence[str],
    reference: str | None = None,
    evaluations: str = "last",
    measure: Measure | None = None,
) -> Study:
    """Read runs as a study. A file is read when it is first needed, and only once.

    Args:
        reference: name of the arm to compare the others with; None means the first arm.
        evaluations: `last` uses the last one of each job; `all` makes each an arm of its own.
        measure: the score of an arm; None means accuracy.

    Raises:
        ValueError, FileNotFoundError: the runs cannot be compared; the message says why.
    """
    measure = measure or Measure()
    if not runs:
        raise ValueError("runs is empty: give run folders, such as 'runs=[outputs/a, outputs/b]'")
    if evaluations not in EVALUATIONS:
        raise ValueError(f"evaluations={evaluations!r}: choose {' or '.join(EVALUATIONS)}")
    jobs = find_jobs(runs)
    if measure.metric is not None:
        if evaluations != "last":
            raise ValueError(
                f"evaluations={evaluations!r}: with metric= a job counts once; use last"
            )
        _require_metric(jobs, measure.metric)
    arms = arms_of(jobs, evaluations, measure.metric)
    if measure.metric is None:
        _require_same_questions(arms)
    compared = [arm for arm in arms if arm.cells]
    if not compared:
        raise ValueError(
            f"runs: none of the {len(jobs)} runs has finished with an evaluation; name the final "
            "metric to rank them by, such as metric=validation/loss direction=minimize"
        )
    names = [arm.name for arm in compared]
    if reference is not None and reference not in names:
        raise ValueError(
            f"reference={reference!r}: no such arm{did_you_mean(reference, names)}; there are "
            f"{', '.join(names)}"
        )
    chosen = compared[0 if reference is None else names.index(reference)]
    return Study(jobs, arms, chosen, measure)


def arms_of(jobs: Sequence[Job], evaluations: str = "last", metric: str | None = None) -> list[Arm]:
    """Group jobs into arms, in the order in which arms first appear. No answers are read.

    Raises:
        ValueError: two finished runs are of the same arm and seed.
    """
    return _of_evaluations(jobs, evaluations) if metric is None else _of_metric(jobs, metric)


def _of_evaluations(jobs: Sequence[Job], evaluations: str) -> list[Arm]:
    """Group the evaluations of finished jobs into arms."""
    found: list[tuple[Job, Step]] = []
    seen: set[Path] = set()
    for job in jobs:
        if not job.finished:
            continue
        steps = [s for s in job.steps if s.stage == EVALUATE]
        for step in steps[-1:] if evaluations == "last" else steps:
            if evaluations == "all" and step.run.folder.resolve() in seen:
                continue  # a step that several pipelines share
            seen.add(step.run.folder.resolve())
            found.append((job, step))
    swept = swept_keys(jobs)
    named = [key for key in swept if key not in _NOT_IN_A_NAME]
    labels = {step.label for job, step in found if job.is_pipeline}
    only_seeds_differ = _only_seeds_differ([job for job, _ in found])
    arms: dict[str, Arm] = {}
    for job, step in found:
        parts = _parts(job, named)
        if not parts and only_seeds_differ and not job.is_pipeline:
            parts.append("all runs")
        elif not parts or (job.is_pipeline and len(labels) > 1):
            parts.append(step.label)
        name = ", ".join(parts)
        arm = arms.setdefault(name, Arm(name, _values(job, swept)))
        _add(arm, Cell(job, step))
    return list(arms.values())


def _of_metric(jobs: Sequence[Job], metric: str) -> list[Arm]:
    """Group jobs into arms by their swept keys; an arm without a finished job is empty."""
    swept = swept_keys(jobs)
    only_seeds_differ = _only_seeds_differ(jobs)
    arms: dict[str, Arm] = {}
    for job in jobs:
        alone = "all runs" if only_seeds_differ else job.run.folder.name
        name = ", ".join(_parts(job, swept)) or alone
        arm = arms.setdefault(name, Arm(name, _values(job, swept)))
        if job.finished and job.steps:
            _add(arm, Cell(job, job.steps[-1], metric))
    return list(arms.values())


def _only_seeds_differ(jobs: Sequence[Job]) -> bool:
    return len({job.seed for job in jobs}) == len(jobs) > 1


def _values(job: Job, keys: Sequence[str]) -> dict[str, str]:
    return {key: job.overrides.get(key, "default") for key in keys}


def _parts(job: Job, keys: Sequence[str]) -> list[str]:
    """Return the `key=value` parts of an arm's name; keys are as short as is unambiguous."""
    short = short_names(keys, ".", fewest=2)
    return [f"{short[key]}={value}" for key, value in _values(job, keys).items()]


def _add(arm: Arm, cell: Cell) -> None:
    seed = cell.job.seed
    if seed in arm.cells:
        raise ValueError(
            f"{cell.job.run.folder} and {arm.cells[seed].job.run.folder} are both {arm.name!r} "
            f"with seed {seed}; leave one of them out of runs"
        )
    arm.cells[seed] = cell


def _require_metric(jobs: Sequence[Job], metric: str) -> None:
    finished = [job for job in jobs if job.finished]
    if not finished:
        why = "; ".join(dict.fromkeys(job.reason for job in jobs))
        raise ValueError(f"runs: none of the {len(jobs)} jobs has finished: {why}")
    names = sorted({name for job in finished for name in job.run.metrics})
    if metric not in names:
        # It is easy to forget a part of the name, such as a pipeline's step.
        near = [name for name in names if name.endswith(f"/{metric}")]
        hint = f"; did you mean {' or '.join(near[:3])}?" if near else did_you_mean(metric, names)
        shown = [name for name in names if not name.startswith(("start/", "time/"))]
        more = ", …" if len(shown) > _SHOWN_NAMES else ""
        raise ValueError(
            f"metric={metric!r}: no finished job has it{hint}; there are "
            f"{', '.join(shown[:_SHOWN_NAMES])}{more}"
        )


def _require_same_questions(arms: Sequence[Arm]) -> None:
    known: dict[frozenset[str], str] = {}
    for arm in arms:
        for cell in arm.cells.values():
            questions = frozenset(answer.problem_id for answer in cell.answers)
            if not questions:
                raise ValueError(f"{cell.step.run.folder} holds no answers.jsonl")
            known.setdefault(questions, str(cell.step.run.folder))
    if len(known) > 1:
        raise ValueError(
            "these evaluations answered different questions: "
            f"{', '.join(list(known.values())[:2])}; compare runs of one benchmark and size"
        )


def failures(jobs: Sequence[Job]) -> list[tuple[str, str]]:
    """Return (name of the folder, reason) of every job that has not finished."""
    return [(job.run.folder.name, job.reason) for job in jobs if not job.finished]
