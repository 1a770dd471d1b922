"""Hardware profiles: what their strategy node builds, and that it reaches the Trainer."""

from collections.abc import Callable

import lightning as L
import pytest
from lightning.pytorch.strategies import SingleDeviceStrategy
from omegaconf import DictConfig

from rlt.config.build import build

Composed = Callable[..., DictConfig]
CARDS = ("gpu_8gb", "gpu_12gb", "gpu_16gb", "gpu_24gb", "gpu_48gb", "gpu_80gb")
PROFILES = (*CARDS, "rocm", "ddp", "slurm", "fsdp")


@pytest.mark.parametrize("profile", PROFILES)
def test_trained_weights_stay_float32_on_gpus(composed: Composed, profile: str) -> None:
    cfg = composed("stage=teacher_rl", f"hardware={profile}")
    assert (cfg.hardware.dtype, cfg.hardware.precision) == ("float32", "bf16-mixed")
    assert cfg.teacher.dtype == "float32"
    assert cfg.trainer.accelerator == "gpu"
    assert "tokens_per_micro_batch" not in cfg.module  # the stage passes the profile's
    assert cfg.rollout.token_budget == cfg.hardware.generation_token_budget


def test_budgets_grow_with_the_memory(composed: Composed) -> None:
    nodes = [composed("stage=evaluate", f"hardware={name}").hardware for name in CARDS]
    assert [f"gpu_{node.memory_gb}gb" for node in nodes] == list(CARDS)
    for key in ("tokens_per_micro_batch", "generation_token_budget"):
        budgets = [node[key] for node in nodes]
        assert budgets == sorted(budgets) and budgets[0] < budgets[-1]


def test_a_mac_s_gpu_is_asked_for(composed: Composed) -> None:
    cfg = composed("stage=teacher_rl", "hardware=mps")
    assert build(cfg.hardware).device.type == "mps"
    assert cfg.trainer.accelerator == "mps" and cfg.hardware.precision == "32-true"


def test_a_strategy_node_becomes_the_trainer_s_strategy(composed: Composed) -> None:
    target = "lightning.pytorch.strategies.SingleDeviceStrategy"
    cfg = composed("stage=teacher_sft", f"hardware.strategy={{_target_: {target}, device: cpu}}")
    node = cfg.trainer.copy()  # as training does, to change it
    trainer = build(node, logger=False, callbacks=[])
    assert isinstance(trainer, L.Trainer)
    assert isinstance(trainer.strategy, SingleDeviceStrategy)
    assert trainer.strategy.root_device.type == "cpu"


def test_only_fsdp_divides_the_weights(composed: Composed) -> None:
    for devices, strategy, shards in ((8, "fsdp", 8), (8, "ddp", 1), (1, "fsdp", 1)):
        cfg = composed(
            "stage=teacher_rl", f"hardware.strategy={strategy}", f"hardware.devices={devices}"
        )
        assert build(cfg.hardware).shards == shards
