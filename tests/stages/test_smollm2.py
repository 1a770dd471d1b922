"""A real language model: does teacher RL raise the reward of SmolLM2 on grade-school problems?"""

from pathlib import Path

import pytest

from tests.stages.cli import results, rlt

# As in experiment=smollm2_gsm, with more held-out problems: their mean is what is tested.
DATA = [
    "data=gsm_symbolic",
    "data.source.size=400",
    "data.max_tokens=320",
    "data.on_bad_row=skip",
    "data.max_train=160",
    "data.max_validation=16",
    "prompt=r1",
    "model@teacher=smollm2_135m_packaged",
    "hardware.tokens_per_micro_batch=2048",
    "hardware.generation_token_budget=16384",
    "trainer.val_check_interval=1000",
]


@pytest.mark.slow
def test_reward_rises(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    warm_up = ["datamodule.batch_size=8", "datamodule.steps=12", "datamodule.epochs=null"]
    rlt(
        ["stage=teacher_sft", *DATA, *warm_up, "optim.lr=1e-4", "output_dir=warm_up"],
        tmp_path, limit_seconds=3600,
    )  # fmt: skip
    losses = results(tmp_path / "warm_up")
    assert losses["validation/loss"] < losses["start/validation/loss"]
    rl = ["datamodule.batch_size=2", "datamodule.steps=16", "module.completions_per_problem=4"]
    rl += ["rollout.temperature=0.7", "rollout.max_new_tokens=128", "optim.lr=1e-5"]
    rlt(
        ["stage=teacher_rl", *DATA, *rl, "teacher_path=warm_up/model", "output_dir=rl"],
        tmp_path, limit_seconds=3600,
    )  # fmt: skip
    metrics = results(tmp_path / "rl")
    assert metrics["validation/reward"] > metrics["start/validation/reward"]
