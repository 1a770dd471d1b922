"""Teacher RL on a CUDA device: `make test-gpu`."""

from pathlib import Path

import pytest
import torch

from tests.cli import results, rlt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("reward", ["rlt", "full_kl"])
def test_policy_reference_and_student_meet_on_the_device(reward: str, tmp_path: Path) -> None:
    on_gpu = ["hardware.accelerator=gpu", "stage=teacher_rl", "debug=teacher_rl"]
    student = ["reward_student=student", "model@student=nano"]
    rlt([*on_gpu, *student, f"reward={reward}", "output_dir=run"], tmp_path)
    metrics = results(tmp_path / "run")
    assert metrics["policy/kl_reference_k3"] >= 0
    assert "validation/reward" in metrics
