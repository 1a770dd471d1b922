"""Memory that runs out, and numbers that are none, in the middle of a training run."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import rlt.llm.logprobs
import rlt.training.sft
from rlt.rewards import SolutionLogProb, TokenScores
from rlt.training import RL
from tests.cli import here, read, results, stage

Run = Callable[..., str]
RUNS = {
    "teacher_rl": ["datamodule.steps=4"],
    "distill": ["explanations=none", "callbacks.checkpoint.every_steps=1"],
}


@pytest.fixture
def run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Trains from the base model into a folder of that name; what was written on stderr."""
    monkeypatch.setattr("rlt.report.write_result", lambda run_dir: None)  # plots take seconds

    def train(name: str, folder: str, status: int = 0) -> str:
        role = "teacher" if name == "teacher_rl" else "student"
        paths = [f"{role}_path={base}", f"output_dir={folder}", "callbacks.progress=null"]
        command = stage(name, *RUNS[name], *paths, "hardware.tokens_per_micro_batch=4096")
        here(command, tmp_path, monkeypatch, status)
        return capsys.readouterr().err

    return train


def memory_for(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and scoring run out of memory above so many tokens a forward pass."""
    decode = rlt.llm.logprobs.decode

    def limited(model: Any, ids_BT: Tensor, mask_BS: Tensor, cache: Any = None) -> Tensor:
        if mask_BS.numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return decode(model, ids_BT, mask_BS, cache)

    monkeypatch.setattr(rlt.llm.logprobs, "decode", limited)


def checkpoints(folder: Path) -> list[str]:
    return sorted(file.stem for file in (folder / "checkpoints").glob("*.ckpt"))


@pytest.mark.parametrize("name", list(RUNS))
def test_a_run_short_of_memory_ends_as_one_that_is_not(
    name: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "not enough memory" not in run(name, "whole")
    memory_for(100, monkeypatch)
    told = run(name, "short")
    assert "not enough memory for hardware.tokens_per_micro_batch=4096 (CUDA out of memory" in told
    of_the_cut = ("padding_fraction", "tokens_per_micro_batch")
    whole, short = (results(tmp_path / folder) for folder in ("whole", "short"))
    lowered = [k for k in whole if k.endswith("tokens_per_micro_batch")]
    assert len(lowered) == 1 and short[lowered[0]] < whole[lowered[0]] == 4096
    expected = {k: v for k, v in whole.items() if not k.endswith(of_the_cut)}
    found = {k: v for k, v in short.items() if not k.endswith(of_the_cut)}
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    models = [load_file(tmp_path / f / "model" / "model.safetensors") for f in ("whole", "short")]
    for tensor, value in models[0].items():
        torch.testing.assert_close(models[1][tensor], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(RUNS))
def test_a_run_that_cannot_fit_says_what_to_change(
    name: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory_for(5, monkeypatch)
    told = run(name, "run", status=2)
    assert "rlt: OutOfMemoryError: not enough memory (CUDA out of memory. Tried to allocate" in told
    assert "even for one row at a time: shorten the rows" in told and "Traceback" not in told
    manifest = read(tmp_path / "run" / "manifest.json")
    assert manifest["status"] == "failed" and "one row at a time" in manifest["error"]


# The command line, in a process that may take so many more MiB once training begins.
LIMITED = """
import resource, sys
from rlt.cli.main import main
from rlt.training.policy import PolicyModule

MORE = int(sys.argv.pop(1)) * 2**20

def limit(module):
    module.policy.train()
    with open("/proc/self/statm") as pages:
        held = int(pages.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MORE, resource.RLIM_INFINITY))

def lift(module):
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

PolicyModule.on_fit_start, PolicyModule.on_fit_end = limit, lift
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_memory_that_really_runs_out(tmp_path: Path) -> None:
    """256 rows of the micro model at once take about a gigabyte."""
    command = stage(
        "distill", "model@student=micro", "explanations=none", "data.source.count=400",
        "data.max_train=256", "datamodule.batch_size=256", "validation_answers=0",
        "hardware.tokens_per_micro_batch=1000000",
    )  # fmt: skip
    told = {}
    for limit in ("100000", "300"):
        done = subprocess.run(
            [sys.executable, "-c", LIMITED, limit, *command, f"output_dir={limit}"],
            cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        told[limit] = done.stdout + done.stderr
    assert "not enough memory" not in told["100000"]
    assert "not enough memory for hardware.tokens_per_micro_batch=1000000" in told["300"]
    enough, short = (results(tmp_path / limit) for limit in told)
    assert short["train/tokens_per_micro_batch"] < 10_000
    for name in ("train/loss", "train/grad_norm", "validation/loss"):
        assert short[name] == pytest.approx(enough[name], rel=1e-4)


def test_a_reward_term_that_is_nan_stops_before_its_step(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, sampled, problems = SolutionLogProb.values, RL.sample, []

    def sample(module: RL, batch: Any) -> Any:
        if module.global_step == 3:
            problems.extend(batch)
        return sampled(module, batch)

    def broken(term: SolutionLogProb, scores: TokenScores) -> Tensor:
        found = values(term, scores)
        if len(problems) == 2:  # for the first completion of that step
            problems.append(None)
            return found * float("nan")
        return found

    monkeypatch.setattr(RL, "sample", sample)
    monkeypatch.setattr(SolutionLogProb, "values", broken)
    told = run("teacher_rl", "run", status=2)
    reason = (
        "training step 3, after 3 optimizer steps: reward term solution_log_prob/mean is nan "
        f"(problems: {problems[0].id}); no optimizer step was taken on it. Lower optim.lr"
    )
    assert f"rlt: NotFiniteError: {reason}" in told and "Traceback" not in told
    manifest = read(tmp_path / "run" / "manifest.json")
    assert manifest["status"] == "failed" and reason in manifest["error"]
    assert checkpoints(tmp_path / "run") == ["step=00000002"]


def test_a_gradient_that_is_nan_stops_before_its_step(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_probs, calls = rlt.training.sft.batch_log_probs, []

    def broken(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        log_probs_BC, entropy_BC = log_probs(*args, **options)
        calls.append(1)
        if len(calls) == 2:
            log_probs_BC.register_hook(lambda gradient: gradient * float("nan"))
        return log_probs_BC, entropy_BC

    monkeypatch.setattr(rlt.training.sft, "batch_log_probs", broken)
    told = run("distill", "run", status=2)
    where = "training step 1, after 1 optimizer steps: the gradient norm is nan (problems: "
    assert f"rlt: NotFiniteError: {where}" in told and " and 3 more)" in told  # 5 of 8 are named
    manifest = read(tmp_path / "run" / "manifest.json")
    assert manifest["status"] == "failed" and where in manifest["error"]
    assert checkpoints(tmp_path / "run") == ["step=00000001"]
