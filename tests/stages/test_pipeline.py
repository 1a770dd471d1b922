"""The pipeline: the very runs that one would make by hand, each made once."""

import math
from pathlib import Path
from typing import Any

import pytest

from rlt.report import read_scalars
from tests.cli import DATA, pipeline_from, read, results, stage, weights
from tests.metrics_doc import documented
from tests.stages.killing import finish

STEPS = ["warm_up", "teacher", "traces", "student", "base_accuracy", "accuracy"]


def steps_of(run: Path) -> dict[str, dict[str, Any]]:
    steps = read(run / "steps.json")
    assert [step["name"] for step in steps] == STEPS
    return {step["name"]: step for step in steps}


def reused(run: Path) -> list[str]:
    return [name for name, step in steps_of(run).items() if step["reused"]]


def written(steps: dict[str, dict[str, Any]]) -> dict[Path, int]:
    """When each artefact was last written."""
    files = [f for step in steps.values() for f in Path(step["dir"]).rglob("*") if f.is_file()]
    return {f: f.stat().st_mtime_ns for f in files if f.name != "hparams.yaml"}


def test_first_run_makes_every_step(piped: Path) -> None:
    assert reused(piped / "first") == []
    for step in steps_of(piped / "first").values():
        folder = Path(step["dir"])
        assert folder.parent == piped / "store" / step["stage"]
        assert read(folder / "manifest.json")["status"] == "finished"
        assert "${" not in (folder / "config.yaml").read_text()
    report = (piped / "first" / "report.md").read_text()
    assert "RLT student" in report
    assert "base student" in report


def test_metrics_are_those_of_the_steps_and_documented(piped: Path) -> None:
    metrics = read(piped / "first" / "metrics.json")
    steps = steps_of(piped / "first")
    assert metrics == {
        f"{name}/{key}": value for name, step in steps.items() for key, value in
        read(Path(step["dir"]) / "metrics.json").items()
    }  # fmt: skip
    for key, value in metrics.items():
        assert documented(key.partition("/")[2]), key
        assert math.isfinite(value)
    for step in steps.values():
        assert all(documented(tag) for tag in read_scalars(Path(step["dir"])))


def test_steps_are_the_stages_run_by_hand(piped: Path, chain: Path) -> None:
    steps = steps_of(piped / "first")
    by_hand = {
        "warm_up": "teacher_sft",
        "teacher": "teacher_rl",
        "traces": "collect",
        "student": "distill",
        "accuracy": "evaluated",
    }
    # A pipeline looks for the questions in its own data.
    trained_on = ["data@trained_on=digit_chain", *(f"trained_on.{k[5:]}" for k in DATA)]
    finish(
        stage("evaluate", "student_path=distill/model", "output_dir=evaluated", *trained_on), chain
    )
    for name, run in by_hand.items():
        assert results(Path(steps[name]["dir"])) == results(chain / run), name
        if steps[name]["stage"] not in ("collect", "evaluate"):
            assert weights(Path(steps[name]["dir"])) == weights(chain / run), name


def test_one_changed_knob_remakes_only_what_depends_on_it(base: Path, piped: Path) -> None:
    before = steps_of(piped / "first")
    times = written(before)
    finish(pipeline_from(base, "output_dir=changed", "teacher_rl.optim.lr=2e-3"), piped)
    assert reused(piped / "changed") == ["warm_up", "base_accuracy"]
    after = steps_of(piped / "changed")
    for name in STEPS:
        same = name in ("warm_up", "base_accuracy")
        assert (after[name]["key"] == before[name]["key"]) is same, name
    assert written(before) == times
    assert weights(Path(after["teacher"]["dir"])) != weights(Path(before["teacher"]["dir"]))


@pytest.mark.parametrize("time", ["first", "second"])
def test_nothing_is_made_twice(base: Path, piped: Path, time: str) -> None:
    """In another output_dir, and then with that very command once more."""
    before = written(steps_of(piped / "first"))
    finish(pipeline_from(base, "output_dir=again"), piped)
    assert reused(piped / "again") == STEPS
    assert written(steps_of(piped / "again")) == before
    assert results(piped / "again") == results(piped / "first")


def test_steps_are_found_by_their_names(piped: Path) -> None:
    for name, step in steps_of(piped / "first").items():
        assert (piped / "first" / "steps" / name).samefile(step["dir"])


@pytest.mark.parametrize("key", ["warm_up", "teacher"])
def test_a_step_is_saved_as_a_config_of_its_stage(piped: Path, key: str) -> None:
    """Nothing of the pipeline is left in it."""
    from omegaconf import OmegaConf

    from rlt.config.build import build_stage

    step = steps_of(piped / "first")[key]
    cfg = OmegaConf.load(Path(step["dir"]) / "config.yaml")
    assert type(build_stage(cfg)).__name__.lower() == step["stage"].replace("_", "")
    assert not OmegaConf.missing_keys(cfg)
