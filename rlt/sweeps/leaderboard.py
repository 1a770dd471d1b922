"""The leaderboard of a study as files for spreadsheets and for TensorBoard's HParams tab.

`leaderboard.csv` has a row for each arm, the best first. `jobs.csv` has a row for each job, with
the reason if it did not finish. Swept keys have columns `params.<key>`, and final metrics of the
jobs have columns `metrics.<name>`. The prefixes keep the two from having equal names.
"""

import csv
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlt.report.text import as_number, metric_unit
from rlt.sweeps.arms import Arm
from rlt.sweeps.jobs import Job, short_names, swept_keys
from rlt.sweeps.study import Study

LEADERBOARD_FILE = "leaderboard.csv"
JOBS_TABLE_FILE = "jobs.csv"
HPARAMS_FOLDER = "hparams"


def write_leaderboard(folder: Path, study: Study) -> None:
    """Write leaderboard.csv, jobs.csv and hparams/, in place of older ones."""
    ranked = enumerate(study.ranked, start=1)
    _write_csv(folder / LEADERBOARD_FILE, [_arm_row(study, arm, place) for place, arm in ranked])
    keys = swept_keys(study.jobs)
    _write_csv(folder / JOBS_TABLE_FILE, [_job_row(job, keys) for job in study.jobs])
    _write_hparams(folder / HPARAMS_FOLDER, study)


def read_leaderboard(folder: Path) -> list[dict[str, str]]:
    """Return the rows of leaderboard.csv; an empty cell is an empty string."""
    return _read_csv(folder / LEADERBOARD_FILE)


def read_unfinished(folder: Path) -> list[dict[str, str]]:
    """Return the rows of jobs.csv whose jobs did not finish."""
    return [row for row in _read_csv(folder / JOBS_TABLE_FILE) if row["status"] != "finished"]


def _arm_row(study: Study, arm: Arm, place: int) -> dict[str, Any]:
    mean, low, high = arm.interval
    against = study.differences.get(arm.name)
    row: dict[str, Any] = {
        "rank": place if math.isfinite(mean) else None,
        "arm": arm.name,
        **{f"params.{key}": value for key, value in arm.overrides.items()},
        "metric": study.measure.name,
        "n": len(arm.scores),
        "mean": mean if arm.scores else None,
        "low": None if math.isnan(low) else low,
        "high": None if math.isnan(high) else high,
        "interval_over": arm.interval_over,
        "unit": metric_unit(study.measure.name),
    }
    ends = against.interval if against else (None, None, None)
    row |= dict(zip(("difference", "difference_low", "difference_high"), ends, strict=True))
    verdict = against.verdict if against else ""
    return row | {"reference_is": "reference" if arm is study.reference else verdict}


def _job_row(job: Job, keys: Sequence[str]) -> dict[str, Any]:
    return {
        "job": job.run.folder.name,
        "folder": job.run.folder if job.run.folder.is_dir() else None,
        "overrides": " ".join(f"{key}={value}" for key, value in job.overrides.items()),
        "seed": job.seed,
        **{f"params.{key}": job.overrides.get(key) for key in keys},
        "status": job.status,
        "reason": job.reason,
        "seconds": job.seconds,
        **{f"metrics.{name}": value for name, value in sorted(job.run.metrics.items())},
    }


def _write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with file.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, columns)
        writer.writeheader()
        writer.writerows(rows)


def _read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def _write_hparams(folder: Path, study: Study) -> None:
    """Write one run of the HParams tab for each job with a score, named like its folder."""
    from torch.utils.tensorboard import SummaryWriter

    if folder.is_dir():
        shutil.rmtree(folder)  # otherwise TensorBoard would show the older events as well
    scored = [
        (arm, cell, cell.score)
        for arm in study.arms
        for cell in arm.cells.values()
        if cell.score is not None
    ]
    asked = {arm.name: dict[str, Any](arm.overrides) for arm in study.arms}
    for key in dict.fromkeys(key for values in asked.values() for key in values):
        numbers = [as_number(values[key]) for values in asked.values()]
        if None not in numbers:  # only a column of numbers gets a scale in the tab
            for values, number in zip(asked.values(), numbers, strict=True):
                values[key] = number
    names = short_names([str(cell.job.run.folder) for _, cell, _ in scored], "/", fewest=1)
    for arm, cell, score in scored:
        run = folder / names[str(cell.job.run.folder)]
        if run.is_dir():  # several evaluations of one pipeline are compared
            run = run / cell.step.name
        with SummaryWriter(str(run)) as writer:
            parameters = {**asked[arm.name], "seed": cell.job.seed}
            writer.add_hparams(parameters, {study.measure.name: score}, run_name=".")
