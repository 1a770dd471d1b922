"""The real command line in a folder of its own, on models and budgets of seconds."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlt.cli.main import main

LIMIT_SECONDS = 240

# What steps have in common, and each stage's own knobs: as they are for a stage by itself, under
# the stage's name for a pipeline.
SHARED = ["hardware.threads=1"]
DATA = ["data.source.count=48", "data.max_train=16", "data.max_validation=4"]
BENCHMARK = ["benchmark.max_questions=8"]
RECIPES = {
    "pretrain": [
        "data.source.count=2000",
        "data.max_validation=16",
        "datamodule.batch_size=32",
        "datamodule.steps=60",
        "trainer.val_check_interval=30",
    ],
    "teacher_sft": [
        "datamodule.batch_size=8",
        "datamodule.steps=4",
        "datamodule.epochs=null",
        "optim.lr=1e-3",
    ],
    "teacher_rl": [
        "datamodule.batch_size=2",
        "datamodule.steps=6",
        "module.group_size=4",
        "rollout.max_new_tokens=12",
        "trainer.val_check_interval=2",
        "callbacks.checkpoint.every_steps=2",
        "optim.lr=1e-3",
    ],
    "collect": [
        "best_of=3",
        "keep_unclosed=true",
        "problems_per_batch=2",
        "rollout.max_new_tokens=12",
    ],
    "distill": [
        "datamodule.batch_size=8",
        "datamodule.epochs=1",
        "rollout.max_new_tokens=20",
        "validation_answers=4",
        "optim.lr=1e-3",
    ],
    "evaluate": ["samples=3", "questions_per_batch=1", "rollout.max_new_tokens=20"],
}


def stage(name: str, *overrides: str) -> list[str]:
    """Arguments of a small run of one stage."""
    own = {"pretrain": [], "evaluate": BENCHMARK}.get(name, DATA)
    return [f"stage={name}", *SHARED, *own, *RECIPES[name], *overrides]


def pipeline(*overrides: str) -> list[str]:
    """Arguments of a pipeline whose steps are the very runs that `stage` describes."""
    recipes = [f"{name}.{knob}" for name, knobs in RECIPES.items() for knob in knobs]
    return ["stage=pipeline", *SHARED, *DATA, *BENCHMARK, *recipes, *overrides]


def pipeline_from(base: Path, *overrides: str) -> list[str]:
    """Arguments of that pipeline from one model for both roles; its steps are kept in `store`."""
    paths = [f"teacher_path={base}", f"student_path={base}"]
    return pipeline("arm=chain", "cache_dir=store", *paths, *overrides)


def rlt(
    arguments: list[str], cwd: Path, status: int = 0, limit_seconds: int = LIMIT_SECONDS
) -> subprocess.CompletedProcess[str]:
    """Run to the end; fails with the output if the exit status is another one."""
    done = subprocess.run(
        rlt_command(arguments), cwd=cwd, env=rlt_environment(), capture_output=True, text=True,
        timeout=limit_seconds,
    )  # fmt: skip
    assert done.returncode == status, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def refused(arguments: list[str], cwd: Path) -> str:
    """What a command that must be refused writes to stderr, run in a process of its own.

    The fixture `refuse` does the same inside this process, which takes a tenth of the time.
    """
    return the_one_message(rlt(arguments, cwd, status=2).stderr)


def the_one_message(stderr: str) -> str:
    """The same text, once it is sure that it tells one error, in words for the user."""
    assert "Traceback" not in stderr, stderr
    assert stderr.count("rlt: ") == 1, stderr
    return stderr


def here(arguments: list[str], cwd: Path, monkeypatch: pytest.MonkeyPatch, status: int = 0) -> None:
    """The same entrypoint inside this process, which has torch loaded already."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["rlt", *arguments])
    found: object = 0
    try:
        main()
    except SystemExit as ended:
        found = ended.code or 0
    assert found == status, f"exit status {found}, not {status}, of rlt {' '.join(arguments)}"


def interrupt(
    arguments: list[str], cwd: Path, when: Callable[[], bool], how: signal.Signals = signal.SIGINT
) -> str:
    """Press Ctrl-C as soon as `when` holds, and return what was written."""
    process = subprocess.Popen(
        rlt_command(arguments), cwd=cwd, env=rlt_environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=heed_interrupts,
    )  # fmt: skip
    end = time.monotonic() + LIMIT_SECONDS
    while not when() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(how)
    output, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 128 + how, f"exit status {process.returncode}\n{output}"
    assert "Traceback" not in output, output
    return output


def heed_interrupts() -> None:
    """A shell starts its background jobs with SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def rlt_command(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "rlt", *arguments]


def rlt_environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def results(folder: Path) -> dict[str, float]:
    """Final metrics without those that depend on the machine."""
    metrics: dict[str, float] = read(folder / "metrics.json")
    return {k: v for k, v in metrics.items() if "time/" not in k and "resources/" not in k}


def weights(run: Path) -> bytes:
    """The bytes of a run's model, or of its adapter."""
    (file,) = (run / "model").glob("*.safetensors")
    return file.read_bytes()
