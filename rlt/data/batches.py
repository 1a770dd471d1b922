"""Batches that are counted in steps. The batch of step k depends on the seed and k alone.

For Lightning the whole run is one epoch, so a run can be resumed from a checkpoint at any step.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
import numpy as np


class Batch:
    """A list of items that Lightning does not take apart, because it is not a plain list.

    Args:
        items: problems or examples.
    """

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)


class StepBatches:
    """The batches of steps 0 to `steps` - 1. The state is the next step, so iteration can resume.

    The items come in random order without replacement: one permutation follows another.

    Args:
        items: the training items.
        batch_size: items per step.
        steps: number of steps.
        seed: seed of the permutations.
    """

    def __init__(self, items: Sequence[Any], batch_size: int, steps: int, seed: int) -> None:
        self.items = items
        self.batch_size = batch_size
        self.steps = steps
        self.seed = seed
        self.next_step = 0

    def batch(self, step: int) -> list[Any]:
        """Return the items of one step. They depend on the seed and the step alone."""
        n = len(self.items)
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        orders = {e: self._order(e) for e in {position // n for position in positions}}
        return [self.items[orders[position // n][position % n]] for position in positions]

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.items))

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        while self.next_step < self.steps:
            self.next_step += 1
            yield Batch(self.batch(self.next_step - 1))

    def state_dict(self) -> dict[str, int]:
        """Return the state for a checkpoint: the next step."""
        return {"next_step": self.next_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from the state of a checkpoint."""
        self.next_step = state["next_step"]


class InOrder:
    """Batches that go through all items once, in their order.

    Args:
        items: the items.
        batch_size: items per batch; the last batch may have fewer.
    """

    def __init__(self, items: Sequence[Any], batch_size: int) -> None:
        self.items = items
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.items) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.items), self.batch_size):
            yield Batch(list(self.items[start : start + self.batch_size]))


class StepDataModule(L.LightningDataModule):
    """Provides training items in steps and validation items in their order.

    Args:
        train: problems or examples to train on.
        validation: held-out problems or examples.
        batch_size: training items per step.
        steps: number of training steps, or None if `epochs` is set.
        epochs: number of passes over the training items, or None if `steps` is set.
        seed: seed of the order of the training items.
        validation_batch_size: held-out items per batch; None takes `batch_size`.

    Raises:
        ValueError: there are no training items, or not exactly one of `steps` and `epochs` is set.
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
            raise ValueError(
                "there are no training items: check the data.* options and the "
                "counts in the manifest"
            )
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
        """Return the training batches."""
        return StepBatches(self.train, self.batch_size, self.steps, self.seed)

    def transfer_batch_to_device(self, batch: Batch, device: Any, dataloader_idx: int) -> Batch:
        """Return the batch as it is, because token ids are moved micro-batch by micro-batch."""
        return batch

    def val_dataloader(self) -> InOrder:
        """Return the validation batches."""
        return InOrder(self.validation, self.validation_batch_size)


def total_steps(items: int, batch_size: int, steps: int | None, epochs: float | None) -> int:
    """Return the number of training steps. Exactly one of `steps` and `epochs` is not None.

    Args:
        items: number of training items.
        batch_size: items per step.
        steps: number of steps, which is returned as it is.
        epochs: number of passes over the items, rounded up to whole batches.

    Raises:
        ValueError: both or neither of steps and epochs are set, the batch size is less than 1, or
            there would be no step.
    """
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
