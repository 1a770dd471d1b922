"""Teacher RL on a real vLLM server, which needs an environment of its own.

RLT_VLLM_PYTHON=~/vllm/bin/python python -m pytest -m slow tests/stages/test_rollout_servers.py
"""

import os
from pathlib import Path

import pytest

from tests.cli import rlt
from tests.stages.same import scalars

PYTHON = os.environ.get("RLT_VLLM_PYTHON")
SMOLLM2 = [
    "stage=teacher_rl", "model@teacher=smollm2_135m_packaged", "data=chain_sum", "prompt=r1",
    "data.source.size=80", "data.max_train=16", "data.max_validation=2", "datamodule.batch_size=2",
    "datamodule.steps=3", "module.group_size=4", "rollout.max_new_tokens=40", "optim.lr=1e-5",
    "hardware.threads=1", "output_dir=run",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="RLT_VLLM_PYTHON names no interpreter with vLLM")
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_three_steps_on_a_real_server(adapter: str, tmp_path: Path) -> None:
    """The server samples from the very weights of each step."""
    server = ["rollout=vllm", f"rollout.python={PYTHON}", "rollout.timeout_seconds=300"]
    server.append("rollout.arguments=--max-model-len 1024 --dtype float32")
    rlt([*SMOLLM2, *server, f"adapter={adapter}"], tmp_path, limit_seconds=1200)
    curves = scalars(tmp_path / "run")
    assert len(curves["policy/mismatch_kl"]) == 3
    assert all(value < 1e-8 for _, value in curves["policy/mismatch_kl"])
    assert all(value < 1.001 for _, value in curves["policy/mismatch_max_ratio"])
