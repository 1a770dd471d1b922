"""`check=true probe=true`: the first steps of a stage, really run, for their time and memory.

A process of its own runs the stage on the real model in a temporary folder and stops after two
steps (RL: of as few problems as an update needs) or two batches; the second is timed. Nothing is
kept. Where an earlier step of a pipeline will make the model, the one that it starts from stands
in: it is of the same shape.
"""

import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import DictConfig, OmegaConf, open_dict

from rlt.runtime import peak_memory_bytes, read_json, write_json
from rlt.stages.estimate import TRAINED, gigabytes

_STEPS = 2
# Key that limits what a stage without a Trainer reads → key of its batch size.
_LIMITS = {
    "collect": ("max_problems", "problems_per_batch"),
    "evaluate": ("benchmark.max_questions", "questions_per_batch"),
    "score": ("data.max_train", "rows_per_batch"),
}
_FILE = "probe.json"


class _Measured(Exception):
    """Enough was seen."""


class StepClock(L.Callback):
    """Times training steps, writes the last one's seconds and the peak of memory, and stops.

    Raises:
        _Measured: after the last step.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.started = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if index + 1 < _STEPS:
            return
        phases = {
            key.removeprefix("time/train_").removesuffix("_seconds"): float(value)
            for key, value in trainer.callback_metrics.items()
            if key.startswith("time/train_") and key.endswith("_seconds")
        }
        _write(self.file, time.perf_counter() - self.started, phases)
        raise _Measured


class _BatchClock(logging.Handler):
    """Takes the seconds of the last batch from what `in_batches` logs."""

    seconds = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == "batch %d took %.4f seconds" and isinstance(record.args, tuple):
            self.seconds = float(str(record.args[1]))


def measure(cfg: DictConfig, made_here: Collection[str], steps: int | None) -> str:
    """Run the first steps of a stage; returns their time and memory, in words.

    Args:
        made_here: keys of the paths that earlier steps of the pipeline will make.
        steps: (or batches) of the whole run, if known.
    """
    if "traces" in made_here:
        return "not measured: its traces are yet to be made"
    if cfg.stage == "compare":
        return "nothing to measure"
    with tempfile.TemporaryDirectory(prefix="rlt-probe-") as folder:
        shortened, share = shorten(cfg, Path(folder), made_here)
        OmegaConf.save(shortened, Path(folder) / "config.yaml", resolve=True)
        paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
        done = subprocess.run(
            [sys.executable, "-P", "-m", "rlt.stages.probe", folder],
            capture_output=True, text=True, check=False,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)},
        )  # fmt: skip
        if not (Path(folder) / _FILE).is_file():
            reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
            raise ValueError(f"the probe of stage={cfg.stage} failed: {reason}")
        found = read_json(Path(folder) / _FILE)
    seconds = found["seconds"] / share
    phases = "".join(f", {name} {value / share:.2g}" for name, value in found["phases"].items())
    total = "" if steps is None else f", about {_duration(seconds * steps)} in all"
    part = "" if share == 1 else f" (from {share:.3g} of one)"
    return (
        f"measured: {seconds:.2g} seconds a {'step' if cfg.stage in TRAINED else 'batch'}{part}"
        f"{phases}{total}; peak {gigabytes(found['peak'])}"
    )


def shorten(cfg: DictConfig, folder: Path, made_here: Collection[str]) -> tuple[DictConfig, float]:
    """The config of a stage's first steps, and what share of a real step each is."""
    short = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    assert isinstance(short, DictConfig)
    share = 1.0
    with open_dict(short):
        short.check = short.probe = False
        short.logger = None
        for key in made_here:
            short[key] = None
        if cfg.stage in TRAINED:
            if "completions_per_problem" in cfg.module:
                needed = math.ceil(cfg.algorithm.minibatches / cfg.module.completions_per_problem)
                short.datamodule.batch_size = min(needed, cfg.datamodule.batch_size)
                share = short.datamodule.batch_size / cfg.datamodule.batch_size
            short.datamodule.steps, short.datamodule.epochs = _STEPS, None
            short.data.validation_share, short.data.max_validation = 0, None
            short.callbacks = {}  # but the clock, which no config may name
            short.trainer.enable_progress_bar = False
        else:
            key, batch = _LIMITS[cfg.stage]
            if OmegaConf.select(short, key.partition(".")[0] if "." in key else "stage"):
                OmegaConf.update(short, key, _STEPS * cfg[batch])
    return short, share


def _run(folder: Path) -> None:
    """In the process of the probe: the stage as it is, until it has been seen enough of."""
    from rlt.stages import common, run_stage

    cfg: Any = OmegaConf.load(folder / "config.yaml")
    clock = _BatchClock(logging.DEBUG)
    logger = logging.getLogger("rlt.stages.common")
    logger.addHandler(clock)
    logger.setLevel(logging.DEBUG)
    common.ADDED_CALLBACKS.append(StepClock(folder / _FILE))
    try:
        run_stage(cfg, folder / "run")
    except _Measured:
        return
    _write(folder / _FILE, clock.seconds, {})


def _write(file: Path, seconds: float, phases: dict[str, float]) -> None:
    import torch

    cuda = torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0
    peak = torch.cuda.max_memory_allocated() if cuda else peak_memory_bytes()
    write_json(file, {"seconds": seconds, "phases": phases, "peak": peak})


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


if __name__ == "__main__":
    # By its importable name, so that the exception is the one that the callback raises.
    from rlt.stages import probe

    probe._run(Path(sys.argv[1]))
