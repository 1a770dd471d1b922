"""Multirun: a folder for each job, keyed by what the jobs differ in; at its end a leaderboard."""

import csv
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.cli import read, results, rlt, weights

METRIC = "validation/reward"


def test_rewards_by_seeds(base: Path, tmp_path: Path) -> None:
    (tmp_path / "base").symlink_to(base)
    tiny = ["debug=teacher_rl", "data.source.count=48", "hardware.threads=1"]
    command = ["-m", "stage=teacher_rl", *tiny, "teacher_path=base", "output_dir=sweep"]
    ranked = (
        f"{{_target_: rlt.stages.compare_jobs.CompareJobs, metric: {METRIC}, direction: minimize}}"
    )
    command += ["reward=rlt,solution_only", "seed=0,1", f"+hydra.callbacks.compare={ranked}"]
    printed = rlt(command, tmp_path).stdout
    runs = {}
    for file in (tmp_path / "sweep").rglob("manifest.json"):
        manifest = read(file)
        assert manifest["status"] == "finished"
        if manifest["stage"] == "compare":
            continue
        has_kl = any("thought_kl" in name for name in results(file.parent))
        runs["rlt" if has_kl else "solution_only", manifest["seed"]] = file.parent
    assert set(runs) == {("rlt", 0), ("rlt", 1), ("solution_only", 0), ("solution_only", 1)}
    assert len({weights(run) for run in runs.values()}) == 4
    for (reward, seed), run in runs.items():
        name = str(run.relative_to(tmp_path))
        assert f"reward={reward}" in name
        assert f"seed={seed}" in name
    _check_leaderboard(tmp_path / "sweep" / "compare", runs)
    assert f"{METRIC}, minimize" in printed and "reward=solution_only" in printed


def _check_leaderboard(folder: Path, runs: dict[tuple[str, int], Path]) -> None:
    rewards = {key: results(run)[METRIC] for key, run in runs.items()}
    means = {name: (rewards[name, 0] + rewards[name, 1]) / 2 for name in ("rlt", "solution_only")}
    with (folder / "leaderboard.csv").open(newline="") as rows:
        board = list(csv.DictReader(rows))
    assert [row["params.reward"] for row in board] == sorted(means, key=lambda name: means[name])
    for row in board:
        assert float(row["mean"]) == pytest.approx(means[row["params.reward"]])
        assert float(row["low"]) < float(row["mean"]) < float(row["high"]) and row["n"] == "2"
    with (folder / "jobs.csv").open(newline="") as rows:
        jobs = {(row["params.reward"], int(row["seed"])): row for row in csv.DictReader(rows)}
    for key, run in runs.items():
        assert float(jobs[key][f"metrics.{METRIC}"]) == pytest.approx(rewards[key])
        [score] = EventAccumulator(str(folder / "hparams" / run.name)).Reload().Scalars(METRIC)
        assert score.value == pytest.approx(rewards[key])
