"""Runs that belong together: which arm and which seed each is, what it measured, what it cost.

An arm is everything that its jobs have in common and other arms have not; its jobs differ in their
seed alone. Arms are named after what was overridden and, where that differs too, after the label of
the evaluation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from rlt.evaluation.benchmark import AnswerRecord, compare_answers, correct_matrix
from rlt.evaluation.statistics import (
    Interval,
    avg_at_k_per_question,
    questions_to_tell_apart,
    share_interval,
    t_interval,
)
from rlt.names import did_you_mean
from rlt.report.comparison import EVALUATE, Step, steps_of, verdict_of
from rlt.report.folder import Run, read_json_list

EVALUATIONS = ("last", "all")
_NOT_IN_A_NAME = ("seed", "arm", "sweep", "experiment", "output_dir", "store_dir", "stage")


@dataclass
class Job:
    """One run of a study: a pipeline, or an evaluation by itself."""

    run: Run

    @cached_property
    def overrides(self) -> dict[str, str]:
        """Key → value, of the command line and of the sweep."""
        pairs = (
            str(o).lstrip("+~").partition("=") for o in self.run.manifest.get("overrides") or []
        )
        return {key: value for key, _, value in pairs}

    @property
    def seed(self) -> int:
        return int(self.run.manifest.get("seed") or 0)

    @property
    def began(self) -> str:
        return str((self.run.manifest.get("began") or [""])[0])

    @property
    def status(self) -> str:
        return str(self.run.manifest.get("status") or "unknown")

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @property
    def is_pipeline(self) -> bool:
        return (self.run.folder / "steps.json").is_file()

    @cached_property
    def steps(self) -> list[Step]:
        """Of a pipeline its steps; an evaluation is the one step of its own."""
        if self.is_pipeline:
            return steps_of(read_json_list(self.run.folder / "steps.json"), self.run.folder)
        seconds = float(self.run.manifest.get("seconds") or 0.0)
        name = self.run.folder.name
        return [Step(name, self.run.stage, name, self.run, reused=False, seconds=seconds)]


@dataclass
class Cell:
    """One arm under one seed."""

    job: Job
    evaluation: Step

    @cached_property
    def steps(self) -> list[Step]:
        """The evaluation and what led to it, in order; of old runs, all that came before it."""
        names = [step.name for step in self.job.steps]
        before = self.job.steps[: names.index(self.evaluation.name) + 1]
        if self.evaluation.needs is None:
            return before
        wanted = {self.evaluation.name}
        for step in reversed(before):
            wanted |= set(step.needs or ()) if step.name in wanted else set()
        return [step for step in before if step.name in wanted]

    def last(self, stage: str) -> Step | None:
        """The last step of a stage among them."""
        return next((step for step in reversed(self.steps) if step.stage == stage), None)

    @property
    def answers(self) -> list[AnswerRecord]:
        return self.evaluation.run.answers

    @cached_property
    def shares_P(self) -> np.ndarray:
        """Share of right answers of each question."""
        return avg_at_k_per_question(correct_matrix(self.answers))


@dataclass
class Arm:
    """Cells that differ in their seed alone."""

    name: str
    cells: dict[int, Cell] = field(default_factory=dict)

    @cached_property
    def accuracy(self) -> Interval:
        """Over seeds where there are several, else over questions."""
        if len(self.cells) > 1:
            return t_interval([float(cell.shares_P.mean()) for cell in self.cells.values()])
        [cell] = self.cells.values()
        return share_interval(cell.shares_P)

    @property
    def first(self) -> Cell:
        return self.cells[min(self.cells)]


@dataclass(frozen=True)
class Difference:
    """`reference` minus `other`, over the seeds (or questions) that both have."""

    other: Arm
    interval: Interval
    seeds: int
    wins: int  # seeds in which the reference is ahead
    questions_needed: int | None

    @property
    def verdict(self) -> str:
        return verdict_of(self.interval)


def find_jobs(paths: Sequence[str]) -> list[Job]:
    """The runs at the paths, or right below them.

    Raises:
        FileNotFoundError: a path is no folder, or holds no run.
    """
    jobs: list[Job] = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise FileNotFoundError(f"runs: {path} is no folder; give run folders, or a sweep's")
        folders = [path, *sorted(child for child in path.iterdir() if child.is_dir())]
        found = [f for f in folders if (f / "manifest.json").is_file()]
        found = [f for f in found if Run(f).stage != "compare"]
        found = found[:1] if found[:1] == [path] else found
        if not found:
            raise FileNotFoundError(
                f"runs: {path} holds no run (no manifest.json in it or right below it)"
            )
        jobs += [Job(Run(folder)) for folder in found]
    return sorted(jobs, key=lambda job: job.began)


def arms_of(jobs: Sequence[Job], evaluations: str = "last") -> list[Arm]:
    """Finished jobs by arm, in the order in which arms first appear.

    Args:
        evaluations: `last` of each job, or `all` of them, each an arm of its own.

    Raises:
        ValueError: two runs are of the same arm and seed, or evaluations asked other questions.
    """
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
    varying = _varying([job for job, _ in found])
    labels = {step.label for job, step in found if job.is_pipeline}
    only_seeds_differ = len({job.seed for job, _ in found}) == len(found) > 1
    arms: dict[str, Arm] = {}
    for job, step in found:
        parts = [f"{_short(key)}={job.overrides.get(key, 'default')}" for key in varying]
        if not parts and only_seeds_differ and not job.is_pipeline:
            parts.append("all runs")
        elif not parts or (job.is_pipeline and len(labels) > 1):
            parts.append(step.label)
        name = ", ".join(parts)
        arm = arms.setdefault(name, Arm(name))
        if job.seed in arm.cells:
            raise ValueError(
                f"{job.run.folder} and {arm.cells[job.seed].job.run.folder} are both {name!r} with "
                f"seed {job.seed}; leave one of them out of runs"
            )
        arm.cells[job.seed] = Cell(job, step)
    _require_same_questions(list(arms.values()))
    return list(arms.values())


def read_study(
    runs: Sequence[str], reference: str | None, evaluations: str
) -> tuple[list[Job], list[Arm], Arm]:
    """Jobs, arms, and the arm that the others are compared with (None: the first).

    Raises:
        ValueError, FileNotFoundError: what cannot be compared, and why.
    """
    if not runs:
        raise ValueError("runs is empty: give run folders, such as 'runs=[outputs/a, outputs/b]'")
    if evaluations not in EVALUATIONS:
        raise ValueError(f"evaluations={evaluations!r}: choose {' or '.join(EVALUATIONS)}")
    jobs = find_jobs(runs)
    arms = arms_of(jobs, evaluations)
    if not arms:
        raise ValueError(f"runs: none of the {len(jobs)} runs has finished with an evaluation")
    names = [arm.name for arm in arms]
    if reference is not None and reference not in names:
        raise ValueError(
            f"reference={reference!r}: no such arm{did_you_mean(reference, names)}; there are "
            f"{', '.join(names)}"
        )
    return jobs, arms, arms[0 if reference is None else names.index(reference)]


def compare_arms(reference: Arm, other: Arm) -> Difference | None:
    """By seed where both have several in common, by question where it is one, None without any."""
    seeds = sorted(reference.cells.keys() & other.cells.keys())
    if not seeds:
        return None
    pairs = [(reference.cells[seed], other.cells[seed]) for seed in seeds]
    differences = [float(a.shares_P.mean() - b.shares_P.mean()) for a, b in pairs]
    wins = sum(difference > 0 for difference in differences)
    if len(seeds) > 1:
        return Difference(other, t_interval(differences), len(seeds), wins, None)
    [(a, b)] = pairs
    needed = questions_to_tell_apart(a.shares_P, b.shares_P)
    return Difference(other, compare_answers(a.answers, b.answers), 1, wins, needed)


def _varying(jobs: Sequence[Job]) -> list[str]:
    """Keys that jobs were given different values of, but for those that are no part of a name."""
    keys = dict.fromkeys(key for job in jobs for key in job.overrides)
    return [
        key
        for key in keys
        if key not in _NOT_IN_A_NAME
        and not key.startswith("hydra.")
        and len({job.overrides.get(key) for job in jobs}) > 1
    ]


def _short(key: str) -> str:
    """The last two parts of a long key."""
    return ".".join(key.split(".")[-2:])


def _require_same_questions(arms: Sequence[Arm]) -> None:
    known: dict[frozenset[str], str] = {}
    for arm in arms:
        for cell in arm.cells.values():
            questions = frozenset(answer.problem_id for answer in cell.answers)
            if not questions:
                raise ValueError(f"{cell.evaluation.run.folder} holds no answers.jsonl")
            known.setdefault(questions, str(cell.evaluation.run.folder))
    if len(known) > 1:
        raise ValueError(
            "these evaluations answered different questions: "
            f"{', '.join(list(known.values())[:2])}; compare runs of one benchmark and size"
        )


def failures(jobs: Sequence[Job]) -> list[tuple[str, str]]:
    """(folder's name, why) of every job that has not finished."""
    return [
        (job.run.folder.name, str(job.run.manifest.get("error") or job.status))
        for job in jobs
        if not job.finished
    ]
