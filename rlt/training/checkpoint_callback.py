"""When checkpoints are written, and all that is in one: a resumed run ends the same, bitwise.

What is small (progress, random numbers, schedules, callbacks) is remembered at the end of every
step; weights and optimizer state are read when a checkpoint is written. As long as no optimizer has
moved the weights since, both belong to the same step, and Ctrl-C loses nothing but the step that
was under way.
"""

import copy
import random
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from rlt.llm.shards import gathered, is_sharded
from rlt.runs import ranks
from rlt.runs.folder import RunRefusedError
from rlt.training.checkpoints import CHECKPOINTS, CheckpointError, listed, write_checkpoint
from rlt.training.lightning_private import (
    count_last_step,
    dump_checkpoint,
    saved_progress,
    steps_begun,
    validate_within_fit,
)
from rlt.training.policy import PolicyModule

_LEAST = {"every_steps": 1, "keep": 2}
_WEIGHTS = ("state_dict", "optimizer_states", "reference")  # of a checkpoint: all that is large


class Checkpoint(L.Callback):
    """Saves the whole training state every so many steps, and when training is interrupted.

    Validation draws its random numbers apart from training, the same ones each time: a resumed run
    repeats the validation at its checkpoint, and goes on as if never interrupted.

    Args:
        every_steps: steps (rollouts, in RL) between two checkpoints.
        keep: newest checkpoints that are kept; at least 2, as the newest may get damaged.

    Attributes:
        metrics: last values logged, those before the checkpoint that was loaded among them.

    Raises:
        ValueError: a number is too small.
    """

    def __init__(self, every_steps: int, keep: int) -> None:
        for name, value in {"every_steps": every_steps, "keep": keep}.items():
            if value < _LEAST[name]:
                raise ValueError(
                    f"callbacks.checkpoint.{name}={value} must be at least {_LEAST[name]}"
                )
        self.every_steps = every_steps
        self.keep = keep
        self.metrics: dict[str, float] = {}
        self._random: dict[str, Any] | None = None
        self._in_training: dict[str, Any] | None = None
        self._done_steps = 0
        self._small: dict[str, Any] | None = None  # what is small, at the end of the last step
        self._logged = False  # whether that step's metrics are written, too

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Raises RunRefusedError when the run was trained for longer than it now shall be."""
        batches = saved_progress(checkpoint)
        done, steps = batches["current"]["ready"], cast(Any, trainer).datamodule.steps
        if done > steps:
            raise RunRefusedError(
                f"datamodule.steps={steps}: this run has been trained for {done} steps already; "
                "give at least as many"
            )
        if done < steps:  # what was the last step when it was written is not, if training goes on
            batches["is_last_batch"] = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After a checkpoint: restore random numbers, repeat the validation of its step."""
        if self._random is None:
            return
        _restore_random_state(self._random)
        self._random = None
        cast(PolicyModule, pl_module).use_configured_hyperparameters()
        # The checkpoint was written before the validation of its step, which may have been cut
        # short; Lightning takes it for done.
        done = steps_begun(trainer)
        if done % int(trainer.val_check_batch or 1) == 0:
            validate_within_fit(trainer)
        if done == trainer.num_training_batches:
            count_last_step(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write the checkpoint that is due."""
        self._after_logging(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Remember all that is small of the step that has ended."""
        # Some are logged now and then: those of steps before the one that was resumed from, too.
        self.metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
        state = dump_checkpoint(trainer)
        small = copy.deepcopy({k: v for k, v in state.items() if k not in _WEIGHTS})
        self._done_steps, self._small, self._logged = batch_idx + 1, small, False
        # Last: interrupted before it, the step is not taken for whole.
        cast(PolicyModule, pl_module).weights_moved = False

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the checkpoint that is due; give validation random numbers of its own."""
        self._after_logging(trainer)
        self._in_training = random_state()
        torch.manual_seed(torch.initial_seed())

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give training its random numbers back."""
        assert self._in_training is not None
        _restore_random_state(self._in_training)
        self._in_training = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the last checkpoint that is due, and let go of the rest."""
        self._after_logging(trainer)
        self._small = None  # the optimizer's state is let go

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Interrupted by Ctrl-C, SIGTERM or the end of another rank, write the last whole step."""
        if not isinstance(exception, KeyboardInterrupt | SIGTERMException | ranks.RankStoppedError):
            return
        # Lightning raises the latter between two steps, when all is logged.
        logged = self._logged or isinstance(exception, SIGTERMException)
        failure = ""
        # Shards are gathered by all ranks together, which were not stopped at the same place.
        alone = not is_sharded(cast(PolicyModule, pl_module).policy)
        if self._small is not None and logged and alone and not pl_module.weights_moved:
            try:
                self._write(trainer)
            except CheckpointError as error:
                failure = f" {error}."
        steps = [entry.step for entry in listed(_folder(trainer))]
        newest = f"the newest is of step {steps[-1]}" if steps else "there is none yet"
        if ranks.is_main():
            print(f"\nTraining was interrupted. Checkpoints: {newest}.{failure}", flush=True)

    def state_dict(self) -> dict[str, Any]:
        """Random numbers and metrics, for a checkpoint."""
        return {"random": random_state(), "metrics": self.metrics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over random numbers and metrics of a checkpoint."""
        self._random = state_dict["random"]
        self.metrics = state_dict["metrics"]

    def _after_logging(self, trainer: L.Trainer) -> None:
        """Write the checkpoint that is due, in the first hook after its step's metrics were logged.

        Written earlier, a run killed in between would go on without those metrics.
        """
        if self._small is None or self._logged:
            return
        for logger in trainer.loggers:
            logger.save()
        self._logged = True
        if self._done_steps % self.every_steps == 0:
            self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        sharded = is_sharded(cast(PolicyModule, trainer.lightning_module).policy)
        if not (ranks.is_main() or sharded):  # the others have the same
            return
        weights = {name: v for name, v in dump_checkpoint(trainer).items() if name in _WEIGHTS}
        if sharded:
            weights = gathered(weights)
        folder = _folder(trainer)
        if not ranks.is_main() or any(e.step == self._done_steps for e in listed(folder)):
            return
        assert self._small is not None
        write_checkpoint(folder, self._done_steps, weights | self._small, self.keep)


def _folder(trainer: L.Trainer) -> Path:
    return Path(trainer.default_root_dir) / CHECKPOINTS


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
