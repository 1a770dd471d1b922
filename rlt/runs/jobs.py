"""Jobs of a sweep: each in a process of its own, each written down when it ends.

Whichever launcher Hydra uses (one job after another, joblib, submitit, Ray), what it calls is
`run_job`, which starts `rlt.cli.worker` and waits for it. A job's folder is named by what it was
asked for, so a sweep that is started again goes on with unfinished jobs and repeats none.
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
        metadata: what the job's manifest is told; its `overrides` name the job.

    Returns:
        The job's final metrics.

    Raises:
        JobFailedError: it failed, or was killed.
        KeyboardInterrupt: this process was interrupted or terminated, and has passed that on.
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

    Ctrl-C and SIGTERM are passed on to it, once, and its end is waited for.

    Args:
        environment: variables that it gets besides this process's own.

    Returns:
        Its exit status, or minus the signal that killed it.

    Raises:
        KeyboardInterrupt: this process was interrupted or terminated; the other has ended.
    """
    # The very package that runs now, wherever the process is started.
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
    """The newest row of each job of a sweep, in the order in which the jobs were begun."""
    file = sweep_dir / JOBS_FILE
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    newest: dict[str, dict[str, Any]] = {}
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # killed while it was written
            continue
        newest[row["dir"]] = row
    return list(newest.values())


def failures(sweep_dir: Path) -> str:
    """Which jobs of a sweep have failed, and why: a line each."""
    jobs = read_jobs(sweep_dir)
    failed = [job for job in jobs if job["status"] == "failed"]
    lines = [f"{len(failed)} of {len(jobs)} jobs failed:"]
    for job in failed:
        reason = (job.get("reason") or "no reason given").splitlines()
        lines.append(f"  {Path(job['dir']).name}: {reason[0]}")
        lines += [f"    {line.strip()}" for line in reason[1:]]
    return "\n".join(lines)


def _write_row(sweep_dir: Path, row: dict[str, Any]) -> None:
    """Append a row in one write, as several jobs may end at once."""
    sweep_dir.mkdir(parents=True, exist_ok=True)
    with (sweep_dir / JOBS_FILE).open("ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
        torn = file.read(1) not in (b"", b"\n")  # killed while it was written
        file.write(b"\n" * torn + (json.dumps(row) + "\n").encode())


def _how_it_ended(code: int | None) -> str:
    if code in (INTERRUPTED, TERMINATED):
        name = signal.Signals(code - 128).name
        return f"{name} was sent to the job alone; tried again, it goes on from its checkpoint"
    if code is None or code >= 0:
        return f"exit status {code}"
    why = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"killed by {signal.Signals(-code).name}{why}"
