"""Progress where there is no terminal to draw a bar on: a line now and then."""

import sys
import time
from typing import Any

import lightning as L

from rlt.runs import ranks
from rlt.runs.formatting import duration, number


class ProgressLines(L.Callback):
    """Prints step, time left and the progress bar's values, if the output is no terminal.

    Args:
        every_seconds: at most one line in so many seconds.

    Raises:
        ValueError: the interval is not positive.
    """

    def __init__(self, every_seconds: float) -> None:
        if every_seconds <= 0:
            raise ValueError(f"callbacks.lines.every_seconds={every_seconds} must be above 0")
        self.every_seconds = every_seconds
        self._started = self._printed = 0.0
        self._done_before: int | None = None  # steps of an earlier, interrupted run

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._started = self._printed = time.monotonic()
        self._done_before = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Print a line, if one is due."""
        now = time.monotonic()
        if self._done_before is None:
            self._done_before = batch_idx
        waits = now - self._printed < self.every_seconds
        if sys.stdout.isatty() or waits or not ranks.is_main():
            return
        self._printed = now
        done, steps = batch_idx + 1, int(trainer.num_training_batches)
        left = (now - self._started) / (done - self._done_before) * (steps - done)
        values = ", ".join(
            f"{name} {number(float(value))}" for name, value in trainer.progress_bar_metrics.items()
        )
        print(f"step {done} of {steps}, {duration(left)} left, {values}", flush=True)
