"""Checkpoints that a run can be resumed from at any step, with the random state Lightning omits."""

import random
import re
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch


class Checkpoint(L.Callback):
    """Saves the whole training state every so many steps.

    Validation draws its random numbers apart from training, the same ones each time: a resumed run
    does not repeat the validation at its checkpoint, and yet goes on as if never interrupted.

    Args:
        every_steps: steps (rollouts, in RL) between two checkpoints.
        keep: newest checkpoints that are kept.

    Attributes:
        metrics: last values logged before the checkpoint that was loaded; {} without one.

    Raises:
        ValueError: a number is below 1.
    """

    def __init__(self, every_steps: int, keep: int) -> None:
        for name, value in {"every_steps": every_steps, "keep": keep}.items():
            if value < 1:
                raise ValueError(f"callbacks.checkpoint.{name}={value} must be at least 1")
        self.every_steps = every_steps
        self.keep = keep
        self.metrics: dict[str, float] = {}
        self._random: dict[str, Any] | None = None
        self._in_training: dict[str, Any] | None = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._in_training = random_state()
        torch.manual_seed(torch.initial_seed())

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._in_training is not None
        _restore_random_state(self._in_training)
        self._in_training = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        if (batch_idx + 1) % self.every_steps == 0:
            self._save(trainer, batch_idx + 1)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._random is not None:
            _restore_random_state(self._random)
            self._random = None

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if isinstance(exception, KeyboardInterrupt):
            found = latest_checkpoint(Path(trainer.default_root_dir))
            newest = f"the newest is of step {_step_of(found)}" if found else "there is none yet"
            print(f"\nTraining was interrupted. Checkpoints: {newest}.", flush=True)

    def state_dict(self) -> dict[str, Any]:
        return {"random": random_state(), "metrics": self.metrics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._random = state_dict["random"]
        self.metrics = state_dict["metrics"]

    def _save(self, trainer: L.Trainer, step: int) -> None:
        folder = Path(trainer.default_root_dir) / "checkpoints"
        path = folder / f"step={step:08d}.ckpt"
        temporary = path.with_suffix(".tmp")
        self.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            temporary.replace(path)
            for old in sorted(folder.glob("step=*.ckpt"))[: -self.keep]:
                old.unlink()


def latest_checkpoint(run_dir: Path) -> Path | None:
    found = sorted((run_dir / "checkpoints").glob("step=*.ckpt"))
    return found[-1] if found else None


def _step_of(path: Path) -> int:
    match = re.search(r"step=(\d+)", path.name)
    assert match
    return int(match.group(1))


def random_state() -> dict[str, Any]:
    """State of Python's, NumPy's and torch's generators, in plain types and tensors."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _restore_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
