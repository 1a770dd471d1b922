"""Warns when a monitor of reward hacking leaves its healthy range.

Run by `rlt stage=teacher_rl`; ranges are in conf/callbacks/rl.yaml, definitions in docs/metrics.md.
"""

import logging
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import lightning as L

from rlt.rewards.monitors import outside, range_text
from rlt.runs.formatting import number

log = logging.getLogger(__name__)

PREFIX = "monitor/"
Range = Sequence[float | None]


class HackingMonitor(L.Callback):
    """Watches the metrics `monitor/<name>`, and makes `monitor/length_drift` of `train/…` ones.

    Args:
        window: values of which the mean is scored.
        after_steps: steps before anything is scored, so that RL can mend what warm-up left.
        ranges: name → [lowest healthy value or null, highest or null].

    Raises:
        ValueError: a window below 1, or a range that is no pair of ascending bounds.
    """

    def __init__(self, window: int, after_steps: int, ranges: Mapping[str, Range]) -> None:
        if window < 1:
            raise ValueError(f"callbacks.hacking.window={window} must be at least 1")
        for name, bounds in ranges.items():
            known = [bound for bound in bounds if bound is not None]
            if len(bounds) != 2 or not known or sorted(known) != known:
                raise ValueError(
                    f"callbacks.hacking.ranges.{name}={list(bounds)}: give [low, high], null for "
                    "no bound on one side"
                )
        self.window = window
        self.after_steps = after_steps
        self.ranges = {name: tuple(bounds) for name, bounds in ranges.items()}
        self._values: dict[str, list[float]] = {}
        self._first_tokens: float | None = None
        self._ringing: list[str] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Take in what the step logged, and judge it."""
        found = trainer.callback_metrics
        logged = [name for name in found if name.startswith(PREFIX)]
        if batch_idx % getattr(pl_module, "monitor_every_steps", 1) or not logged:
            return
        values = {name.removeprefix(PREFIX): float(found[name]) for name in logged}
        if "train/completion_tokens" in found:
            tokens = float(found["train/completion_tokens"])
            self._first_tokens = self._first_tokens or tokens
            values["length_drift"] = tokens / self._first_tokens
            pl_module.log(f"{PREFIX}length_drift", values["length_drift"])
        for name, value in values.items():
            self._values[name] = [*self._values.get(name, []), value][-self.window :]
        if batch_idx + 1 >= self.after_steps:
            self._judge(batch_idx)

    def _judge(self, step: int) -> None:
        for name, (low, high) in self.ranges.items():
            values = self._values.get(name)
            if not values:
                continue
            mean = fmean(values)
            if not outside(mean, low, high):
                self._ringing = [other for other in self._ringing if other != name]
            elif name not in self._ringing:
                self._ringing.append(name)
                log.warning(
                    "step %d: %s%s is %s, healthy is %s. The reward may be hacked: read the last "
                    "samples, and docs/metrics.md on what this number says",
                    step + 1, PREFIX, name, number(mean), range_text(low, high),
                )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far, for a checkpoint."""
        return {
            "values": self._values,
            "first_tokens": self._first_tokens,
            "ringing": self._ringing,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what a checkpoint had seen."""
        self._values = state_dict["values"]
        self._first_tokens = state_dict["first_tokens"]
        self._ringing = state_dict["ringing"]
