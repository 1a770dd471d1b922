"""`check=true probe=true` runs the first steps of a stage to measure their time and memory.

A separate process runs the stage on the real model in a temporary folder. It stops after a few
seconds of steps or batches. The first one only warms up and does not count in the median. RL starts
with as few problems as an update needs. Short steps are repeated with more problems, because the
time of a larger part predicts the time of a whole step better. Nothing is kept. If an earlier step
of a pipeline will make the model, the model that it starts from is used; it has the same shape.
"""

import contextlib
import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import DictConfig, OmegaConf, open_dict

from rlt import PACKAGE_DIR
from rlt.preflight.memory_advice import gigabytes
from rlt.rewards.preflight import WHOLE
from rlt.runs.environment import peak_memory_bytes
from rlt.runs.files import read_json, write_json
from rlt.stages import training
from rlt.stages.preflight import PREFLIGHT_FILE
from rlt.stages.rl import RLStage
from rlt.stages.run import run_stage
from rlt.stages.stage import ModelStage, Stage
from rlt.stages.training import TrainingStage

_AT_MOST = 20  # steps or batches
_ENOUGH = 5.0  # seconds, provided that at least two steps or batches were seen
_SHORT = 1.0  # seconds; a part of an RL step that takes less is repeated with more problems
_GROWTH = 8
_FILE = "probe.json"


class _ProbeDoneError(Exception):
    """Enough steps or batches were seen."""


class _Clock:
    """Seconds of each step or batch so far, and of its phases."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def add(self, seconds: float, phases: dict[str, float] | None = None) -> None:
        """Record one step or batch, and raise _ProbeDoneError once there are enough."""
        self.seen.append({"whole": seconds, **(phases or {})})
        total = sum(one["whole"] for one in self.seen)
        if len(self.seen) > 1 and (total > _ENOUGH or len(self.seen) == _AT_MOST):
            raise _ProbeDoneError

    def medians(self) -> dict[str, float]:
        """Return the median seconds, without the first step or batch if there are others."""
        later = self.seen[1:] or self.seen
        return {key: statistics.median(one[key] for one in later) for key in later[0]}


class StepClock(L.Callback):
    """Measures the time of training steps and stops after enough of them."""

    def __init__(self, clock: _Clock) -> None:
        self.clock = clock
        self.started = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock of a step."""
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Record the seconds of the step and of the phases that the module logged.

        Raises:
            _ProbeDoneError: enough steps were seen.
        """
        phases = {
            key.removeprefix("time/train_").removesuffix("_seconds"): float(value)
            for key, value in trainer.callback_metrics.items()
            if key.startswith("time/train_") and key.endswith("_seconds")
        }
        self.clock.add(time.perf_counter() - self.started, phases)


class _BatchClock(logging.Handler):
    """Takes the seconds of each batch from what `in_batches` logs."""

    def __init__(self, clock: _Clock) -> None:
        super().__init__(logging.DEBUG)
        self.clock = clock

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == "batch %d took %.4f seconds" and isinstance(record.args, tuple):
            self.clock.add(float(str(record.args[1])))


def measure(cfg: DictConfig, stage: Stage, made_here: Collection[str], steps: int | None) -> str:
    """Run the first steps of a stage and return their time and memory as text.

    Args:
        made_here: keys of the paths that earlier steps of the pipeline will make.
        steps: steps or batches of the whole run; None if not known.
    """
    if "traces" in made_here:
        return "not measured: its traces are yet to be made"
    if not isinstance(stage, ModelStage):
        return "nothing to measure"
    trains = isinstance(stage, TrainingStage)
    problems = 1
    areas: list[dict[str, Any]] = []
    while True:
        with tempfile.TemporaryDirectory(prefix="rlt-probe-") as folder:
            shortened, share = shorten(cfg, stage, made_here, problems)
            if areas:  # the first try has measured them
                OmegaConf.update(shortened, "preflight", None)
            found = _measured(shortened, Path(folder))
            areas = areas or found["areas"]
        if share == 1 or found["medians"]["whole"] > _SHORT:
            break
        problems = shortened.datamodule.batch_size * _GROWTH
    medians = {name: value / share for name, value in found["medians"].items()}
    seconds = medians.pop("whole")
    phases = "".join(f", {name} {value:.2g}" for name, value in medians.items())
    total = "" if steps is None else f", about {_duration(seconds * steps)} in all"
    part = "" if share == 1 else f" (from {share:.3g} of one)"
    told = ", ".join(
        f"{row['area']:.2f} [{row['low']:.2f}, {row['high']:.2f}] against {row['against']}"
        for row in areas
        if row["term"] == WHOLE
    )
    return (
        f"measured: {seconds:.2g} seconds a {'step' if trains else 'batch'}{part}"
        f"{phases}{total}; peak {gigabytes(found['peak'])}"
        + (f"\n  reward preflight, area under the ROC curve: {told}" if told else "")
    )


def _measured(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Run the config in a separate process in `folder` and return its measurements.

    Raises:
        ValueError: the process failed; the message ends with its last line of output.
    """
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    paths = [str(PACKAGE_DIR.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "rlt.preflight.probe", folder],
        capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)},
    )  # fmt: skip
    if not (folder / _FILE).is_file():
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise ValueError(f"the probe of stage={cfg.stage} failed: {reason}")
    return dict(read_json(folder / _FILE))


def shorten(
    cfg: DictConfig, stage: ModelStage, made_here: Collection[str], problems: int
) -> tuple[DictConfig, float]:
    """Return a config of a stage's first steps, and the share of a real step that each is.

    Args:
        problems: problems in an RL step, unless an update needs more.
    """
    short = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    assert isinstance(short, DictConfig)
    share = 1.0
    with open_dict(short):
        short.check = short.probe = False
        short.logger = None
        for key in made_here:
            short[key] = None
        if "preflight" in short and made_here:  # another model stands in for the reward's student
            short.preflight = None
        if isinstance(stage, TrainingStage):
            if isinstance(stage, RLStage):
                needed = math.ceil(stage.algorithm.minibatches / stage.group_size)
                problems = min(max(needed, problems), cfg.datamodule.batch_size)
                short.datamodule.batch_size = problems
                share = short.datamodule.batch_size / cfg.datamodule.batch_size
            short.datamodule.steps, short.datamodule.epochs = _AT_MOST, None
            short.data.validation_fraction, short.data.max_validation = 0, None
            short.callbacks = {}  # only the clock, which no config may name
            short.trainer.enable_progress_bar = False
        elif stage.limit is not None:
            key, batch = stage.limit
            if OmegaConf.select(short, key.partition(".")[0] if "." in key else "stage"):
                limit = OmegaConf.select(short, key)
                most = _AT_MOST * cfg[batch]
                OmegaConf.update(short, key, most if limit is None else min(limit, most))
    return short, share


def _run(folder: Path) -> None:
    """Run the stage in the probe's own process until enough steps or batches were seen."""
    import torch

    cfg: Any = OmegaConf.load(folder / "config.yaml")
    clock = _Clock()
    logger = logging.getLogger("rlt.stages.common")
    logger.addHandler(_BatchClock(clock))
    logger.setLevel(logging.DEBUG)
    training.ADDED_CALLBACKS.append(StepClock(clock))
    with contextlib.suppress(_ProbeDoneError):  # a shorter stage ends by itself
        run_stage(cfg, folder / "run")
    if not clock.seen:
        raise ValueError("nothing to measure: no step or batch was run")
    cuda = torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0
    peak = torch.cuda.max_memory_allocated() if cuda else peak_memory_bytes()
    file = folder / "run" / PREFLIGHT_FILE
    areas = read_json(file) if file.is_file() else []
    write_json(folder / _FILE, {"medians": clock.medians(), "peak": peak, "areas": areas})


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


if __name__ == "__main__":
    # The import makes _ProbeDoneError the same class here and in the callback.
    from rlt.preflight import probe

    probe._run(Path(sys.argv[1]))
