"""Sweeps: each job in a process of its own, failures told, nothing repeated, studies that go on."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlt.runs.jobs import read_jobs
from tests.cli import (
    heed_interrupts,
    read,
    refused,
    results,
    rlt,
    rlt_command,
    rlt_environment,
)

TINY = ["stage=teacher_rl", "debug=teacher_rl", "data.source.count=48"]


def jobs_of(sweep: Path) -> dict[str, dict]:
    """Newest row of each job, by the last of its overrides."""
    return {Path(row["dir"]).name: row for row in read_jobs(sweep)}


def test_a_failed_job_is_told_and_tried_again_and_a_finished_one_is_not(tmp_path: Path) -> None:
    """A completion that does not fit the model stops its own job, and no other."""
    command = [
        "-m", *TINY, "hardware.threads=1", "output_dir=sweep",
        "rollout.max_new_tokens=4,1020", "seed=0,1",
    ]  # fmt: skip
    done = rlt(command, tmp_path, status=1)
    assert "rlt: 2 of 4 jobs failed:" in done.stderr
    too_long = "the teacher's context holds"
    assert done.stderr.partition("2 of 4 jobs failed")[2].count(too_long) == 2
    assert "Traceback" not in done.stderr
    jobs = read_jobs(tmp_path / "sweep")
    assert [job["status"] for job in jobs] == ["finished", "finished", "failed", "failed"]
    for job in jobs:
        manifest = read(Path(job["dir"]) / "manifest.json")
        assert manifest["status"] == job["status"]
        assert manifest.get("error") == job["reason"]
    again = rlt(["resume", "sweep"], tmp_path, status=1)
    assert (again.stdout + again.stderr).count("already finished, nothing to do") == 2
    for job in jobs[:2]:
        assert len(read(Path(job["dir"]) / "manifest.json")["began"]) == 1


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for processes in /proc")
def test_a_job_that_is_terminated_alone_does_not_stop_the_others(tmp_path: Path) -> None:
    command = ["-m", *TINY, "hardware.threads=1", "seed=0,1", "output_dir=sweep"]
    process = subprocess.Popen(
        rlt_command(command), cwd=tmp_path, env=rlt_environment(), text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    while not list(tmp_path.glob("sweep/*/manifest.json")):
        assert process.poll() is None
        time.sleep(0.05)
    (job,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(job), signal.SIGTERM)
    _, told = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "seed=0: SIGTERM was sent to the job alone" in told
    assert [job["status"] for job in read_jobs(tmp_path / "sweep")] == ["failed", "finished"]
    rlt(command, tmp_path)
    assert [job["status"] for job in read_jobs(tmp_path / "sweep")] == ["finished", "finished"]


def test_jobs_beside_each_other_divide_the_threads(tmp_path: Path) -> None:
    command = ["-m", *TINY, "seed=0,1", "output_dir=sweep", "hydra/launcher=parallel"]
    environment = {k: v for k, v in rlt_environment().items() if k != "OMP_NUM_THREADS"}
    subprocess.run(
        rlt_command([*command, "hydra.launcher.n_jobs=2"]), cwd=tmp_path, env=environment,
        check=True, capture_output=True, timeout=240,
    )  # fmt: skip
    for job in read_jobs(tmp_path / "sweep"):
        manifest = read(Path(job["dir"]) / "manifest.json")
        assert manifest["status"] == "finished"
        assert manifest["hardware"]["torch_threads"] == max(1, (os.cpu_count() or 2) // 2)


STUDY = [
    "-m", *TINY, "hardware.threads=1", "output_dir=study", "hydra/sweeper=optuna",
    "hydra.sweeper.metric=validation/reward", "hydra.sweeper.direction=maximize",
    "optim.lr=tag(log,interval(1e-5,1e-3))",
]  # fmt: skip


def test_a_study_counts_failed_trials_and_goes_on(
    tmp_path: Path, refuse: Callable[..., str]
) -> None:
    import optuna

    failing = [*STUDY, "rollout.temperature=choice(0.7,-1)"]  # below 0: a trial that fails
    rlt([*failing, "hydra.sweeper.n_trials=2"], tmp_path)  # proposed: 0.7 twice
    rlt([*failing, "hydra.sweeper.n_trials=3"], tmp_path, status=1)
    told = rlt([*failing, "hydra.sweeper.n_trials=3"], tmp_path, status=1)  # as it was, not 0
    assert "1 of 3 jobs failed" in told.stderr
    other = [*failing, "hydra.sweeper.n_trials=4", "hydra.sweeper.direction=minimize"]
    message = refuse(*other)
    assert "was begun with direction maximize, not minimize" in message
    (name,) = optuna.get_all_study_names(f"sqlite:///{tmp_path}/study/optuna.db")
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{tmp_path}/study/optuna.db")
    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE", "COMPLETE", "FAIL"]
    jobs = read_jobs(tmp_path / "study")
    assert len(jobs) == 3
    for trial, job in zip(study.trials, jobs, strict=True):
        assert (trial.state.name == "FAIL") == (trial.params["rollout.temperature"] == -1)
        if trial.state.name == "COMPLETE":
            assert trial.value == results(Path(job["dir"]))["validation/reward"]
        else:
            assert "rollout.temperature=-1" in job["reason"]


def test_a_study_of_a_misspelt_choice_or_metric_can_be_mended(
    tmp_path: Path, refuse: Callable[..., str]
) -> None:
    import optuna

    study = [*STUDY, "hydra.sweeper.n_trials=2"]
    message = refuse(*study, "reward=rtl,rlt_5")
    assert "reward=rtl: no such option; did you mean 'rlt'" in message
    assert not (tmp_path / "study").exists()
    misspelt = [*study, "hydra.sweeper.metric=validation/rewrad"]
    message = refused(misspelt, tmp_path)
    assert "the job has no such metric; did you mean 'validation/reward'" in message
    assert len(read_jobs(tmp_path / "study")) == 1  # the others are not begun
    rlt(study, tmp_path)
    found = optuna.load_study(study_name="rlt", storage=f"sqlite:///{tmp_path}/study/optuna.db")
    assert [trial.state.name for trial in found.trials] == ["COMPLETE"] * 2
    assert len(read_jobs(tmp_path / "study")) == 2


@pytest.mark.slow
def test_a_killed_study_goes_on_with_the_trial_that_was_under_way(tmp_path: Path) -> None:
    import optuna

    command = [*STUDY, "hydra.sweeper.n_trials=3", "hydra.sweeper.seeds=[0,1]"]
    kill_when(command, tmp_path, lambda: len(list(tmp_path.glob("study/*/metrics.json"))) == 3)
    rlt(command, tmp_path)
    study = optuna.load_study(study_name="rlt", storage=f"sqlite:///{tmp_path}/study/optuna.db")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3
    assert len(read_jobs(tmp_path / "study")) == 6  # no job twice, none that belongs to no trial


@pytest.mark.slow
def test_a_sweep_of_twenty_killed_ten_times(tmp_path: Path) -> None:
    long = [*TINY, "hardware.threads=1", "datamodule.steps=6", "callbacks.checkpoint.every_steps=1"]
    command = ["-m", *long, "seed=0,1,2,3,4", "reward=rlt,solution_only,length,random"]
    rlt([*command, "output_dir=whole"], tmp_path, limit_seconds=1800)
    draw = random.Random(0)
    for _ in range(10):
        end = time.monotonic() + draw.uniform(8, 40)
        kill_when([*command, "output_dir=cut"], tmp_path, lambda end=end: time.monotonic() > end)
    finished = {
        job: read(Path(row["dir"]) / "manifest.json")["ended"]
        for job, row in jobs_of(tmp_path / "cut").items()
        if row["status"] == "finished"
    }
    rlt([*command, "output_dir=cut"], tmp_path, limit_seconds=1800)
    jobs = jobs_of(tmp_path / "cut")
    assert len(jobs) == 20 and {row["status"] for row in jobs.values()} == {"finished"}
    for job, ended in finished.items():
        assert read(tmp_path / "cut" / job / "manifest.json")["ended"] == ended
    for job in jobs:
        whole, cut = tmp_path / "whole" / job, tmp_path / "cut" / job
        assert results(cut) == results(whole)
        weights = "model/model.safetensors"
        assert (cut / weights).read_bytes() == (whole / weights).read_bytes()


@pytest.mark.slow
def test_jobs_of_submitit_s_local_executor(tmp_path: Path) -> None:
    rlt(["-m", *TINY, "seed=0,1", "output_dir=sweep", "hydra/launcher=slurm_local"], tmp_path)
    jobs = read_jobs(tmp_path / "sweep")
    assert [job["status"] for job in jobs] == ["finished", "finished"]


@pytest.mark.slow
def test_jobs_of_a_ray_cluster_on_this_machine(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="pip install '.[ray]'")
    rlt(["-m", *TINY, "seed=0,1", "output_dir=sweep", "hydra/launcher=ray_cluster"], tmp_path)
    jobs = read_jobs(tmp_path / "sweep")
    assert [job["status"] for job in jobs] == ["finished", "finished"]


def kill_when(arguments: list[str], cwd: Path, when: Callable[[], bool]) -> None:
    """Start a sweep and kill it, by SIGKILL; its job's process then ends by itself."""
    process = subprocess.Popen(
        rlt_command(arguments), cwd=cwd, env=rlt_environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=heed_interrupts,
    )  # fmt: skip
    while not when() and process.poll() is None:
        time.sleep(0.05)
    assert process.poll() is None, "it ended before it was killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
