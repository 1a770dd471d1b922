"""The jobs of a sweep, or runs given by hand: the overrides of each, how it ended, and why.

There are three sources. The run folders describe the jobs that began. The sweep's `jobs.jsonl` also
lists jobs that were killed, or refused before they had a folder. Its `multirun.yaml` tells which
jobs were planned.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from rlt.report.comparison import Step, steps_of
from rlt.report.folder import Run, read_json_list
from rlt.runs.jobs import read_jobs

NOT_STARTED = "not started"
# The jobs of one arm may differ in these overrides: the seed, and the folders of results.
_NOT_SWEPT = ("seed", "sweep", "output_dir", "cache_dir")


@dataclass
class Job:
    """One job: a pipeline, or a stage by itself. Its folder need not exist.

    Args:
        told: the sweep's record of the job: `overrides`, `status`, `reason`, `seconds`.
    """

    run: Run
    told: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def overrides(self) -> dict[str, str]:
        """Key → value of the overrides from the command line and from the sweep."""
        return _pairs(self.run.manifest.get("overrides") or self.told.get("overrides") or [])

    @property
    def seed(self) -> int:
        """The seed of the job; 0 where none is recorded."""
        return int(self.run.manifest.get("seed") or self.overrides.get("seed") or 0)

    @property
    def began(self) -> str:
        """When the job first began, in ISO 8601; empty if it never did."""
        return str((self.run.manifest.get("began") or [""])[0])

    @property
    def status(self) -> str:
        """`finished`, `failed`, `interrupted`, `running`, `not started` or `unknown`."""
        own = self.run.manifest.get("status")
        if own in (None, "running"):  # a job that was killed could not record it
            own = self.told.get("status") or own
        return str(own or "unknown")

    @property
    def finished(self) -> bool:
        """Whether the job ran to its end."""
        return self.status == "finished"

    @property
    def reason(self) -> str:
        """Why the job did not finish, in one line; empty if it finished."""
        if self.finished:
            return ""
        why = self.run.manifest.get("error") or self.told.get("reason") or self.status
        return " ".join(str(why).split())

    @property
    def seconds(self) -> float | None:
        """The job's time in seconds, or None if it is not known."""
        seconds = self.run.manifest.get("seconds", self.told.get("seconds"))
        return None if seconds is None else float(seconds)

    @property
    def is_pipeline(self) -> bool:
        """Whether the job ran a pipeline, as its steps.json shows."""
        return (self.run.folder / "steps.json").is_file()

    @cached_property
    def steps(self) -> list[Step]:
        """The steps of a pipeline. Any other job is a single step."""
        if self.is_pipeline:
            return steps_of(read_json_list(self.run.folder / "steps.json"), self.run.folder)
        name = self.run.folder.name
        return [
            Step(name, self.run.stage, name, self.run, reused=False, seconds=self.seconds or 0.0)
        ]


def find_jobs(paths: Sequence[str]) -> list[Job]:
    """Return the runs at the paths, or directly below them, in the order in which they began.

    The jobs of a sweep that have no run folder come last.

    Raises:
        FileNotFoundError: a path is no folder, or holds no run.
    """
    jobs: list[Job] = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise FileNotFoundError(f"runs: {path} is no folder; give run folders, or a sweep's")
        found = [Job(Run(path))] if (path / "manifest.json").is_file() else _jobs_below(path)
        if not found:
            raise FileNotFoundError(
                f"runs: {path} holds no run (no manifest.json in it or right below it)"
            )
        jobs += found
    return sorted(jobs, key=lambda job: (not job.began, job.began))


def _jobs_below(sweep: Path) -> list[Job]:
    # Jobs are matched by the name of their folder, because the sweep's folder may have moved.
    told = {Path(row["dir"]).name: row for row in read_jobs(sweep)}
    begun = sorted(child.name for child in sweep.iterdir() if (child / "manifest.json").is_file())
    names = dict.fromkeys([*begun, *told])
    jobs = [Job(Run(sweep / name), told.get(name, {})) for name in names]
    jobs = [job for job in jobs if not getattr(job.run.stage_class, "writes_own_report", False)]
    planned = _planned(sweep)
    swept = _varying(planned)
    for overrides in planned:
        if not any(overrides.items() <= job.overrides.items() for job in jobs):
            name = ",".join(f"{key}={overrides[key]}" for key in swept) or "job"
            rows = [f"{key}={value}" for key, value in overrides.items()]
            jobs.append(
                Job(Run(sweep / name.replace("/", "_")), {"status": NOT_STARTED, "overrides": rows})
            )
    return jobs


def _planned(sweep: Path) -> list[dict[str, str]]:
    """Return the overrides of every job that the sweep's last command asked for.

    The list is empty where this cannot be told from the command: for a sweeper other than Hydra's
    basic one, and for a glob over the options of a group.
    """
    file = sweep / "multirun.yaml"
    if not file.is_file():
        return []
    cfg = OmegaConf.load(file)
    if OmegaConf.select(cfg, "hydra.sweeper._target_") != (
        f"{BasicSweeper.__module__}.{BasicSweeper.__qualname__}"
    ):
        return []
    params = OmegaConf.select(cfg, "hydra.sweeper.params") or {}
    asked = [f"{key}={value}" for key, value in params.items()]
    asked += OmegaConf.select(cfg, "hydra.overrides.task") or []
    try:
        [batch] = BasicSweeper.split_arguments(
            OverridesParser.create().parse_overrides(asked), max_batch_size=None
        )
    except HydraException:
        return []
    return [
        {
            key: value
            for key, value in _pairs(overrides).items()
            if key != "output_dir" and not key.startswith("hydra.")
        }
        for overrides in batch
    ]


def swept_keys(jobs: Sequence[Job]) -> list[str]:
    """Return the keys whose values differ between jobs, except the seed and result folders."""
    return [
        key
        for key in _varying([job.overrides for job in jobs])
        if key not in _NOT_SWEPT and not key.startswith("hydra.")
    ]


def short_names(names: Iterable[str], separator: str, fewest: int) -> dict[str, str]:
    """Return for each name its last parts: at least `fewest`, and enough to make it unique."""
    names = list(dict.fromkeys(names))

    def ending(name: str, parts: int) -> str:
        return separator.join(name.split(separator)[-parts:])

    short = {}
    for name in names:
        parts = fewest
        while ending(name, parts) in {ending(n, parts) for n in names if n != name}:
            if ending(name, parts) == name:
                break
            parts += 1
        short[name] = ending(name, parts)
    return short


def _pairs(overrides: Iterable[Any]) -> dict[str, str]:
    pairs = (str(override).lstrip("+~").partition("=") for override in overrides)
    return {key: value for key, _, value in pairs}


def _varying(rows: Sequence[Mapping[str, str]]) -> list[str]:
    keys = dict.fromkeys(key for row in rows for key in row)
    return [key for key in keys if len({row.get(key) for row in rows}) > 1]
