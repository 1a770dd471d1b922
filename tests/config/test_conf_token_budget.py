"""`hardware.tokens_per_micro_batch=auto`: the number that a run finds, and keeps."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from rlt.cli.run import run
from rlt.config.build import build_stage
from rlt.preflight.budget import free_bytes, tokens_that_fit
from rlt.preflight.memory_advice import with_settings
from rlt.preflight.memory_estimate import Lengths, longest_row, peak_bytes, shape_of
from rlt.report import read_scalars

Composed = Callable[..., DictConfig]
AUTO = "hardware.tokens_per_micro_batch=auto"
SHORT = (
    "stage=teacher_sft", "data=digit_chain_gold", "data.source.count=32", "data.max_validation=4",
    "datamodule.batch_size=4", "datamodule.epochs=null", "callbacks.checkpoint.every_steps=1",
    "trainer.log_every_n_steps=1",
)  # fmt: skip


def free(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr("rlt.preflight.budget.free_bytes", lambda hardware: size)


@pytest.mark.parametrize("stage", ["teacher_rl", "teacher_sft", "distill", "student_rl"])
def test_the_largest_power_of_two_that_fits(
    composed: Composed,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stage: str,
) -> None:
    """Its estimate fits 85 % of what is free, and that of its double does not."""
    monkeypatch.setattr("rlt.preflight.memory_estimate.held_bytes", lambda: 0)
    own = ["explanations=none"] if stage == "distill" else []
    built = build_stage(composed(f"stage={stage}", "datamodule.batch_size=64", AUTO, *own))
    shapes = {role: shape_of(built.source(role)) for role in built.roles}
    lengths = Lengths([30], [40])
    longest, prompt = longest_row(built, lengths)

    def peak(tokens: int) -> float:
        other = with_settings(built, {"hardware.tokens_per_micro_batch": tokens})
        phases = peak_bytes(other, shapes, longest, prompt)
        return max(size for phase, size in phases.items() if phase != "rollout")

    free(monkeypatch, 1.01 * peak(1024) / 0.85)
    found = tokens_that_fit(built, shapes, lengths)
    assert found == 1024 and peak(2 * found) > peak(found)
    free(monkeypatch, 10**12)
    assert tokens_that_fit(built, shapes, lengths) == 8192
    free(monkeypatch, 1)
    assert tokens_that_fit(built, shapes, lengths) == longest
    assert "hold no more than one row" in caplog.text


def test_memory_gb_bounds_what_is_free(composed: Composed) -> None:
    hardware = build_stage(composed("stage=teacher_sft", "hardware.memory_gb=0.25")).hardware
    assert free_bytes(hardware) == 2**28


def test_a_run_keeps_its_number(
    composed: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 1)
    run(composed(*SHORT, AUTO, "datamodule.steps=2"), tmp_path)
    kept = json.loads((tmp_path / "manifest.json").read_text())["tokens_per_micro_batch"]
    free(monkeypatch, 10**12)
    run(composed(*SHORT, AUTO, "datamodule.steps=3"), tmp_path)
    used = [value for _, value in read_scalars(tmp_path)["train/tokens_per_micro_batch"]]
    assert used == [kept] * 3 and kept < 1024


def test_a_plan_tells_the_number(
    composed: Composed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(composed(*SHORT, AUTO, "datamodule.steps=2", "check=true"), tmp_path)
    assert "auto: 8192 in" in capsys.readouterr().out


def test_another_word_is_refused(composed: Composed) -> None:
    with pytest.raises(ValueError, match="whole number of at least 1, or auto"):
        build_stage(composed("stage=teacher_sft", "hardware.tokens_per_micro_batch=most"))
