"""Jobs of a sweep: each runs in its own process and is recorded when it ends.

Every launcher of Hydra (basic, joblib, submitit, Ray) calls `run_job`, which starts
`rlt.cli.worker` and waits for it. A job's folder is named after its overrides. A sweep that is
started again therefore resumes its unfinished jobs and repeats none.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlt import PACKAGE_DIR
from rlt.runs.files import read_json, write_json
from rlt.runs.signals import INTERRUPTED, TERMINATED, Terminated, exit_status

JOBS_FILE = "jobs.jsonl"


class JobFailedError(Exception):
    """A job ended without a result. Arguments: the reason, the job's folder, the sweep's folder."""

    def __str__(self) -> str:
        return str(self.args[0])


def run_job(
    cfg: DictConfig, run_dir: Path, sweep_dir: Path, metadata: dict[str, Any]
) -> dict[str, float]:
    """Run one job in a fresh process and write its end to `<sweep_dir>/jobs.jsonl`.

    Args:
        metadata: entries for the job's manifest; its `overrides` identify the job.

    Returns:
        The job's final metrics.

    Raises:
        JobFailedError: the job failed or was killed.
        KeyboardInterrupt: this process was interrupted or terminated, and so was the job.
    """
    row: dict[str, Any] = {"overrides": metadata["overrides"], "dir": str(run_dir)}
    _write_row(sweep_dir, row | {"status": "running"})
    started = time.time()
    with tempfile.TemporaryDirectory(prefix="rlt-job-") as folder:
        config = Path(folder) / "config.yaml"
        OmegaConf.save(cfg, config)
        write_json(config.with_name("metadata.json"), metadata)
        stop: KeyboardInterrupt | None = None
        code: int | None
        try:
            code = run_config(config, run_dir)
        except KeyboardInterrupt as caught:
            stop, code = caught, exit_status(caught)
        file = config.with_name("result.json")
        result = read_json(file) if file.is_file() else {}
    metrics = result.get("metrics")
    reason = None
    if metrics is None and stop is None:
        reason = result.get("error") or _how_it_ended(code)
    row |= {
        "status": "failed" if reason else "interrupted" if stop else "finished",
        "reason": reason,
        "seconds": round(time.time() - started, 1),
        "exit_code": code,
    }
    _write_row(sweep_dir, row)
    if stop is not None:
        raise stop
    if reason:
        raise JobFailedError(reason, str(run_dir), str(sweep_dir))
    assert metrics is not None
    return dict(metrics)


def run_config(config: Path, run_dir: Path, environment: Mapping[str, str] | None = None) -> int:
    """Run a saved config in a fresh process (`rlt.cli.worker`).

    Ctrl-C and SIGTERM are passed on once. The function then waits until the process ends.

    Args:
        environment: variables that are added to those of this process.

    Returns:
        The exit status, or minus the number of the signal that killed the process.

    Raises:
        KeyboardInterrupt: this process was interrupted or terminated; the started one has ended.
    """
    # The process must import the package that runs now, whatever its working directory.
    paths = [str(PACKAGE_DIR.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "rlt.cli.worker", str(config), str(run_dir), str(os.getpid())],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | dict(environment or {}),
        process_group=0,
    )
    try:
        return process.wait()
    except KeyboardInterrupt as stop:
        process.send_signal(signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)
        process.wait()
        raise


def read_jobs(sweep_dir: Path) -> list[dict[str, Any]]:
    """Return the newest row of each job of a sweep, in the order in which the jobs began."""
    file = sweep_dir / JOBS_FILE
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    newest: dict[str, dict[str, Any]] = {}
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # the process was killed while it wrote this line
            continue
        newest[row["dir"]] = row
    return list(newest.values())


def failures(sweep_dir: Path) -> str:
    """Return the failed jobs of a sweep and their reasons, one job per line."""
    jobs = read_jobs(sweep_dir)
    failed = [job for job in jobs if job["status"] == "failed"]
    lines = [f"{len(failed)} of {len(jobs)} jobs failed:"]
    for job in failed:
        reason = (job.get("reason") or "no reason given").splitlines()
        lines.append(f"  {Path(job['dir']).name}: {reason[0]}")
        lines += [f"    {line.strip()}" for line in reason[1:]]
    return "\n".join(lines)


def _write_row(sweep_dir: Path, row: dict[str, Any]) -> None:
    """Append a row in one write, because several jobs may end at the same time."""
    sweep_dir.mkdir(parents=True, exist_ok=True)
    with (sweep_dir / JOBS_FILE).open("ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
        torn = file.read(1) not in (b"", b"\n")  # a process was killed while it wrote
        file.write(b"\n" * torn + (json.dumps(row) + "\n").encode())


def _how_it_ended(code: int | None) -> str:
    if code in (INTERRUPTED, TERMINATED):
        name = signal.Signals(code - 128).name
        return f"{name} was sent to the job alone; tried again, it goes on from its checkpoint"
    if code is None or code >= 0:
        return f"exit status {code}"
    why = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"killed by {signal.Signals(-code).name}{why}"
