"""Batches counted in steps: what a run trains on at step k depends on seed and k alone.

One Lightning epoch is the whole run, so a checkpoint at any step is one that can be resumed.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
import numpy as np


class Batch:
    """A list of items. A class of its own, so that Lightning does not take it apart."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)


class StepBatches:
    """Batches of steps `0 … steps-1`; goes on after the last one drawn when restored.

    Items come in the order of one random permutation after another (without replacement).
    """

    def __init__(self, items: Sequence[Any], batch_size: int, steps: int, seed: int) -> None:
        self.items = items
        self.batch_size = batch_size
        self.steps = steps
        self.seed = seed
        self.next_step = 0

    def batch(self, step: int) -> list[Any]:
        """The items of one step, a pure function of seed and step."""
        n = len(self.items)
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        orders = {e: self._order(e) for e in {place // n for place in places}}
        return [self.items[orders[place // n][place % n]] for place in places]

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.items))

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        while self.next_step < self.steps:
            self.next_step += 1
            yield Batch(self.batch(self.next_step - 1))

    def state_dict(self) -> dict[str, int]:
        return {"next_step": self.next_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next_step = state["next_step"]


class InOrder:
    """Batches of all items, once, in order."""

    def __init__(self, items: Sequence[Any], batch_size: int) -> None:
        self.items = items
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.items) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.items), self.batch_size):
            yield Batch(list(self.items[start : start + self.batch_size]))


class StepDataModule(L.LightningDataModule):
    """Training items in steps, validation items in order.

    Args:
        train, validation: problems or examples.
        batch_size: items per step.
        steps, epochs: how long to train; exactly one of them is given.
        seed: of the order of the training items.
        validation_batch_size: held-out items at once; None: `batch_size`.

    Raises:
        ValueError: there is nothing to train on, or not exactly one of steps and epochs.
    """

    def __init__(
        self,
        train: Sequence[Any],
        validation: Sequence[Any],
        batch_size: int,
        steps: int | None,
        epochs: float | None,
        seed: int,
        validation_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not train:
            raise ValueError("there are no training items: look at data.* and at the manifest")
        self.train = train
        self.validation = validation
        self.batch_size = batch_size
        self.steps = total_steps(len(train), batch_size, steps, epochs)
        self.seed = seed
        self.validation_batch_size = validation_batch_size or batch_size

    @staticmethod
    def settings_errors(
        batch_size: int,
        steps: int | None,
        epochs: float | None,
        validation_batch_size: int | None = None,
    ) -> list[str]:
        """What is wrong with settings, before there is anything to train on."""
        counts = {
            "batch_size": batch_size, "steps": steps, "epochs": epochs,
            "validation_batch_size": validation_batch_size,
        }  # fmt: skip
        errors = [
            f"{name}={value}: must be a whole number of at least 1"
            for name, value in counts.items()
            if value is not None
            and (isinstance(value, bool) or not isinstance(value, int) or value < 1)
        ]
        if (steps is None) == (epochs is None):
            errors.append(f"steps={steps} and epochs={epochs}: set one, and the other null")
        return errors

    def train_dataloader(self) -> StepBatches:
        return StepBatches(self.train, self.batch_size, self.steps, self.seed)

    def transfer_batch_to_device(self, batch: Batch, device: Any, dataloader_idx: int) -> Batch:
        return batch  # token ids go to the device micro-batch by micro-batch

    def val_dataloader(self) -> InOrder:
        return InOrder(self.validation, self.validation_batch_size)


def total_steps(items: int, batch_size: int, steps: int | None, epochs: float | None) -> int:
    """Steps of a run; an epoch is rounded up to whole batches."""
    if (steps is None) == (epochs is None):
        raise ValueError(
            f"datamodule.steps={steps} and datamodule.epochs={epochs}: set one, and the other null"
        )
    if batch_size < 1:
        raise ValueError(f"datamodule.batch_size={batch_size} must be at least 1")
    if steps is None:
        assert epochs is not None
        steps = int(np.ceil(epochs * items / batch_size))
    if steps < 1:
        raise ValueError(f"datamodule.steps={steps}: train for at least one step")
    return steps
