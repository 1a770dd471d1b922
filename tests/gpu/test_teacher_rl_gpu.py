"""Teacher RL on a CUDA device: `make test-gpu`."""

import math
from pathlib import Path

import pytest
import torch

from rlt.report import read_scalars
from tests.cli import results, rlt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("reward", ["rlt", "full_kl"])
def test_policy_reference_and_student_meet_on_the_device(reward: str, tmp_path: Path) -> None:
    on_gpu = ["hardware.accelerator=gpu", "stage=teacher_rl", "debug=teacher_rl"]
    student = ["reward_student=student", "model@student=nano"]
    rlt([*on_gpu, *student, f"reward={reward}", "optim.lr=1e-3", "output_dir=run"], tmp_path)
    # Reference and policy are the same before the first step, and no longer after it.
    (_, first), (_, second) = read_scalars(tmp_path / "run")["policy/kl_reference_k3"]
    assert first == pytest.approx(0.0, abs=1e-6) and second > 1e-5
    assert math.isfinite(results(tmp_path / "run")["validation/reward"])
