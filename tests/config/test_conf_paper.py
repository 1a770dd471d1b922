"""The paper's recipe, number by number, and that its check needs neither hub nor GPU."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from rlt.config.build import build_stage


@pytest.fixture(scope="module")
def steps(composed: Callable[..., DictConfig]) -> dict[str, DictConfig]:
    return build_stage(composed("experiment=paper_7b")).configs


def test_warm_up(steps: dict[str, DictConfig]) -> None:
    cfg = steps["warm_up"]
    assert cfg.teacher.path == "Qwen/Qwen2.5-7B-Instruct"
    assert cfg.data.source.path == "bespokelabs/Bespoke-Stratos-17k"
    assert (cfg.datamodule.epochs, cfg.datamodule.batch_size) == (10, 16)
    assert (cfg.optim.lr, cfg.optim.weight_decay, cfg.optim.betas) == (1e-5, 1e-4, [0.9, 0.95])
    assert cfg.schedule.name == "cosine_with_min_lr"


def test_teacher_rl(steps: dict[str, DictConfig]) -> None:
    cfg = steps["teacher"]
    assert cfg.datamodule.steps == 125
    assert (cfg.datamodule.batch_size, cfg.module.group_size) == (16, 64)
    assert cfg.optim.lr == 1e-6
    assert (cfg.schedule.name, cfg.schedule.num_warmup_steps) == ("constant_with_warmup", 0)
    assert cfg.algorithm.beta == 0.04
    assert cfg.algorithm.importance_weighted_k3 is False
    assert cfg.algorithm.reference_update_every_steps == 32
    assert cfg.algorithm.reference_mix_up == 0.9
    assert (cfg.rollout.temperature, cfg.rollout.max_new_tokens) == (0.7, 16384)
    terms = cfg.reward.terms
    assert terms.solution_log_prob.coefficients == {"mean": 1.0, "min": 0.01}
    assert terms.thought_kl.coefficients == {"mean": 1.0, "max": 0.01}
    assert (terms.solution_log_prob.weight, terms.thought_kl.weight) == (1.0, 3.0)


def test_one_model_is_the_reward_s_student_and_another_is_distilled(
    steps: dict[str, DictConfig],
) -> None:
    assert steps["teacher"].reward_student == "student"
    for name in ("teacher", "traces"):
        assert steps[name].student.path == "bespokelabs/Bespoke-Stratos-7B"
    for name in ("student", "base_accuracy"):
        assert steps[name].student.path == "Qwen/Qwen2.5-7B-Instruct"
    assert steps["teacher"].hardware.dtype == "float32"  # of the trained weights
    assert steps["teacher"].student.dtype == "bfloat16"
    assert steps["traces"].teacher.dtype == "bfloat16"


def test_base_and_student_are_evaluated_on_three_benchmarks(steps: dict[str, DictConfig]) -> None:
    benchmarks = {name: c.benchmark.name for name, c in steps.items() if c.stage == "evaluate"}
    assert benchmarks == {
        "base_accuracy": "aime24", "accuracy": "aime24",
        "base_math500": "math500", "math500": "math500",
        "base_gpqa": "gpqa_diamond", "gpqa": "gpqa_diamond",
    }  # fmt: skip
    assert steps["gpqa"].benchmark.data.source == {
        "_target_": "rlt.evaluation.sources.Gpqa",
        "path": "Idavidrein/gpqa",
        "name": "gpqa_diamond",
        "split": "train",
        "revision": None,
        "seed": 0,
    }  # nothing left of aime24
    for name in ("accuracy", "math500", "gpqa"):
        assert steps[name].student_path.endswith("/student/model")
        base = steps[f"base_{name}"]
        assert base.student_path is None
        assert base.samples == steps[name].samples


def test_the_check_needs_no_hub(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rlt", "experiment=paper_7b", "check=true"],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty"),
             "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "is sound; nothing was loaded or written" in done.stdout
    assert "tokenizer not checked" in done.stdout and "data: hub not reached" in done.stdout
    assert "benchmark gpqa_diamond: hub not reached" in done.stdout
