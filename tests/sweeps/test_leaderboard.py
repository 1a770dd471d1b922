"""The leaderboard of a sweep: any metric, either direction, every job; its files and its print."""

import csv
import json
import math
import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata, plugin_data_pb2

from rlt.sweeps.jobs import find_jobs, short_names
from rlt.sweeps.page import print_study, write_study_report
from rlt.sweeps.study import Measure, read_study
from tests.report.report_runs import make_run, write_lines
from tests.report.test_report import check_markdown

REWARD = Measure("validation/reward", "maximize")
LOSS = Measure("validation/loss", "minimize")


def job(sweep: Path, overrides: str, reward: float | None, **manifest: Any) -> Path:
    """A job of teacher RL: its overrides, seed among them, and what it measured."""
    folder = sweep / overrides.replace(" ", ",")
    metrics = {} if reward is None else {"validation/reward": reward, "validation/loss": -reward}
    make_run(folder, "teacher_rl", metrics | {"train/reward": 0.0})
    told = json.loads((folder / "manifest.json").read_text())
    told |= {"overrides": overrides.split(), "seed": int(overrides.rpartition("seed=")[2])}
    (folder / "manifest.json").write_text(json.dumps(told | manifest))
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Three learning rates: two seeds, two seeds, one seed and one failure; one rate diverged."""
    folder = tmp_path / "sweep"
    for rate, *rewards in [("0.0001", -3.0, -2.0), ("0.001", -1.0, -1.5), ("0.01", -0.5)]:
        for seed, reward in enumerate(rewards):
            job(folder, f"optim.lr={rate} seed={seed}", reward)
    failed = {"status": "failed", "error": "ValueError: loss\nis nan"}
    job(folder, "optim.lr=0.01 seed=1", -9.0, **failed)
    job(folder, "optim.lr=1 seed=0", math.nan)
    job(folder, "optim.lr=1 seed=1", -0.1)
    return folder


def compared(sweep: Path, measure: Measure = REWARD, reference: str | None = None) -> Path:
    run = sweep / "compare"
    if not run.is_dir():
        config = {"metric": measure.metric, "direction": measure.direction, "title": None}
        make_run(run, "compare", {}, config | {"runs": [str(sweep)]})
    write_study_report(run, read_study([str(sweep)], reference, measure=measure))
    return run


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_ranks_means_and_intervals(sweep: Path) -> None:
    board = rows(compared(sweep) / "leaderboard.csv")
    assert [(row["rank"], row["params.optim.lr"], row["n"]) for row in board] == [
        ("1", "0.01", "1"), ("2", "0.001", "2"), ("3", "0.0001", "2"), ("", "1", "2"),
    ]  # fmt: skip
    one, two, _, diverged = board
    assert (one["mean"], one["low"], one["interval_over"]) == ("-0.5", "", "")
    # t(0.975, 1) = 12.706, standard error 0.25
    half = 12.7062 * 0.25
    assert float(two["low"]) == pytest.approx(-1.25 - half, abs=1e-3)
    assert float(two["high"]) == pytest.approx(-1.25 + half, abs=1e-3)
    assert (two["arm"], two["interval_over"], two["unit"]) == ("optim.lr=0.001", "seeds", "")
    assert diverged["mean"] == "nan" and diverged["low"] == ""


def test_lower_is_better_if_it_is_said_so(sweep: Path) -> None:
    study = read_study([str(sweep)], "optim.lr=0.001", measure=LOSS)
    assert [arm.name[9:] for arm in study.ranked] == ["0.01", "0.001", "0.0001", "1"]
    difference = study.differences["optim.lr=0.0001"]
    assert difference is not None
    # Losses 1 and 1.5 against 3 and 2: less by 2 and 0.5, too few seeds to be sure of it.
    assert difference.interval.mean == -1.25 and difference.wins == 2
    assert difference.verdict == "within noise"
    job(sweep, "optim.lr=1e-7 seed=0", -30.0)
    job(sweep, "optim.lr=1e-7 seed=1", -30.4)
    study = read_study([str(sweep)], "optim.lr=0.001", measure=LOSS)
    difference = study.differences["optim.lr=1e-7"]
    assert difference is not None and difference.verdict == "better"
    # One has a single seed; of the other, one score is no number.
    assert study.differences["optim.lr=0.01"] is study.differences["optim.lr=1"] is None


def test_every_job_is_listed(sweep: Path) -> None:
    (sweep / "optim.lr=0.01,seed=1" / "metrics.json").unlink()
    running = job(sweep, "optim.lr=0.1 seed=0", None, status="running")
    killed = job(sweep, "optim.lr=0.1 seed=1", None, status="running")
    at = {"dir": f"elsewhere/{killed.name}", "overrides": ["optim.lr=0.1", "seed=1"]}
    refused = {"dir": "elsewhere/x", "overrides": ["optim.lr=-1", "seed=0"], "seconds": 2.5}
    write_lines(
        sweep / "jobs.jsonl",
        [
            at | {"status": "running", "reason": None},
            refused | {"status": "failed", "reason": "optim.lr=-1: must be positive"},
            at | {"status": "failed", "reason": "killed by signal 9"},
        ],
    )
    planned = {
        "sweeper": {
            "_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
            "params": {"optim.lr": "0.01,0.1,0.5", "seed": "0,1,2"},
        },
        "overrides": {"task": ["output_dir=sweep", "seed=0,1"]},
    }
    OmegaConf.save({"hydra": planned}, sweep / "multirun.yaml")
    run = compared(sweep)
    listed = {
        (row["params.optim.lr"], row["seed"]): row for row in rows(run / "jobs.csv")
    }  # the command line's seeds, not the file's
    assert len(listed) == 13
    assert {key: row["reason"] for key, row in listed.items() if row["status"] != "finished"} == {
        ("0.01", "1"): "ValueError: loss is nan",
        ("0.1", "0"): "running",
        ("0.1", "1"): "killed by signal 9",
        ("-1", "0"): "optim.lr=-1: must be positive",
        ("0.5", "0"): "not started",
        ("0.5", "1"): "not started",
    }
    refusal = listed["-1", "0"]
    assert (refusal["seconds"], refusal["job"], refusal["folder"]) == ("2.5", "x", "")
    assert listed["0.001", "0"]["metrics.validation/reward"] == "-1.0"
    assert listed["0.001", "0"]["folder"] == str(sweep / "optim.lr=0.001,seed=0")
    arms = {row["params.optim.lr"]: row for row in rows(run / "leaderboard.csv")}
    assert (arms["0.1"]["n"], arms["0.1"]["rank"], arms["0.1"]["mean"]) == ("0", "", "")
    text = check_markdown(run / "report.md")
    assert "6 of 13 jobs." in text and "| optim.lr=-1: must be positive |" in text
    assert "| `optim.lr=0.5,seed=0` | not started |" in text
    assert running.name in text


def test_the_page_and_what_is_printed(sweep: Path) -> None:
    run = compared(sweep, reference="optim.lr=0.001")
    text = check_markdown(run / "report.md")
    assert "Ranked by `validation/reward`, the highest first." in text
    assert "| 1 | optim.lr=0.01 | -0.5 | -0.5 | 1 |" in text
    assert "|  | optim.lr=1 | nan | nan -0.1 | 2 |" in text
    assert "One seed has no interval" in text and "without a finite mean have no rank" in text
    assert (run / "plots" / "leaderboard.png").is_file()
    assert (run / "plots" / "by_optim.lr.png").is_file()
    out = StringIO()
    print_study(run, Console(file=out, width=80))
    printed = out.getvalue()
    table = [line for line in printed.splitlines() if line.startswith("│")]
    assert all(len(line) <= 80 and line.endswith("│") for line in table)  # nothing cut off
    assert "validation/reward, maximize" in printed and "(reference)" in printed
    assert "+1.25 within noise" in printed and "[-8.28, +10.78]" in printed
    assert "failed: optim.lr=0.01,seed=1: ValueError: loss is nan" in printed


def test_hparams_are_in_tensorboard_once(sweep: Path) -> None:
    compared(sweep)
    run = compared(sweep)
    assert len(list((run / "hparams").iterdir())) == 7  # all but the one that failed
    found = EventAccumulator(str(run / "hparams" / "optim.lr=0.001,seed=1")).Reload()
    [score] = found.Scalars("validation/reward")
    assert score.value == -1.5
    start = found.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    values = plugin_data_pb2.HParamsPluginData.FromString(start).session_start_info.hparams
    assert values["optim.lr"].number_value == 0.001 and values["seed"].number_value == 1


def test_a_metric_that_is_not_there(sweep: Path) -> None:
    def refused(message: str, *arguments: str, **others: Any) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            read_study([str(sweep)], measure=Measure(*arguments), **others)

    told = "no finished job has it; did you mean 'validation/reward'"
    refused(told, "validation/rewards", "maximize")
    refused("did you mean train/reward or validation/reward?", "reward", "maximize")
    refused("direction=None: choose maximize or minimize", "validation/reward")
    refused("direction='up': choose", "validation/reward", "up")
    told = "with metric= a job counts once"
    refused(told, "validation/reward", "maximize", evaluations="all")
    refused("name the final metric to rank them by")
    with pytest.raises(ValueError, match="direction='minimize' goes with metric="):
        Measure(None, "minimize")
    for folder in sweep.iterdir():
        (folder / "metrics.json").write_text("{}")
        manifest = json.loads((folder / "manifest.json").read_text())
        failed = manifest | {"status": "failed", "error": "ValueError: x"}
        (folder / "manifest.json").write_text(json.dumps(failed))
    with pytest.raises(ValueError, match=r"8 jobs has finished: ValueError: x$"):
        read_study([str(sweep)], measure=Measure("validation/reward", "maximize"))


def test_a_metric_that_some_jobs_lack_does_not_count_there(sweep: Path) -> None:
    job(sweep, "optim.lr=0.001 seed=2", None)
    job(sweep, "optim.lr=1e-6 seed=2", None)
    arms = {arm.name: arm for arm in read_study([str(sweep)], measure=REWARD).ranked}
    assert list(arms["optim.lr=0.001"].scores) == [0, 1]
    assert arms["optim.lr=1e-6"].scores == {}
    assert [row["mean"] for row in rows(compared(sweep) / "leaderboard.csv")][-1] == ""


def test_keys_that_end_alike_are_told_apart(tmp_path: Path) -> None:
    keys = ["teacher.optim.lr", "student.optim.lr", "a.b.c.weight", "optim.lr", "seed"]
    assert short_names(keys, ".", fewest=2) == {
        "teacher.optim.lr": "teacher.optim.lr", "student.optim.lr": "student.optim.lr",
        "a.b.c.weight": "c.weight", "optim.lr": "optim.lr", "seed": "seed",
    }  # fmt: skip
    for rates in ("1 2", "2 1"):
        teacher, student = rates.split()
        job(tmp_path / "s", f"teacher.optim.lr={teacher} student.optim.lr={student} seed=0", 1.0)
    names = {arm.name for arm in read_study([str(tmp_path / "s")], measure=REWARD).arms}
    assert names == {
        "teacher.optim.lr=1, student.optim.lr=2", "teacher.optim.lr=2, student.optim.lr=1",
    }  # fmt: skip


def test_a_sweep_of_another_sweeper_tells_nothing_of_what_was_planned(sweep: Path) -> None:
    other = {"sweeper": {"_target_": "my.Sweeper"}, "overrides": {"task": ["seed=0,1,2"]}}
    OmegaConf.save({"hydra": other}, sweep / "multirun.yaml")
    assert len(find_jobs([str(sweep)])) == 8
