"""Batches depend on seed and step alone, and iteration resumes after a checkpoint."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlt.data.batches import Batch, InOrder, StepBatches, StepDataModule, total_steps


def drawn(loader: StepBatches) -> list[list[Any]]:
    return [batch.items for batch in loader]


@given(n=st.integers(1, 20), batch_size=st.integers(1, 30), steps=st.integers(1, 12))
def test_every_item_once_an_epoch(n: int, batch_size: int, steps: int) -> None:
    items = [f"item {i}" for i in range(n)]
    batches = drawn(StepBatches(items, batch_size, steps, seed=1))
    assert [len(batch) for batch in batches] == [batch_size] * steps
    flat = [item for batch in batches for item in batch]
    for start in range(0, len(flat), n):
        epoch = Counter(flat[start : start + n])
        assert set(epoch.values()) == {1}


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    items = list(range(10))
    one, other = StepBatches(items, 4, 9, seed=0), StepBatches(items, 4, 100, seed=0)
    batches = drawn(one)
    torch.manual_seed(123)  # no global generator is read
    assert [other.batch(step) for step in (8, 0, 3)] == [batches[8], batches[0], batches[3]]
    assert drawn(StepBatches(items, 4, 9, seed=1)) != batches
    epochs = [tuple(x for b in batches for x in b)[start : start + 10] for start in (0, 10, 20)]
    assert len(set(epochs)) == 3  # each epoch has another order


def test_restored_batches_go_on_after_the_last_one_drawn() -> None:
    whole = drawn(StepBatches(list(range(7)), 3, 8, seed=2))
    first = StepBatches(list(range(7)), 3, 8, seed=2)
    stream = iter(first)
    head = [next(stream).items for _ in range(5)]
    second = StepBatches(list(range(7)), 3, 8, seed=2)
    second.load_state_dict(first.state_dict())
    assert head + drawn(second) == whole
    assert first.state_dict() == {"next_step": 5}
    assert len(second) == 8


def test_validation_batches_in_order() -> None:
    loader = InOrder([1, 2, 3, 4, 5], 2)
    assert [batch.items for batch in loader] == [[1, 2], [3, 4], [5]]
    assert len(loader) == 3
    assert len(InOrder([], 2)) == 0
    one, other = (StepDataModule([0], [1, 2, 3], 2, 3, None, 0, size) for size in (None, 3))
    assert [batch.items for batch in one.val_dataloader()] == [[1, 2], [3]]
    assert [batch.items for batch in other.val_dataloader()] == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("items", "batch_size", "steps", "epochs", "expected"),
    [(10, 4, None, 1, 3), (10, 4, None, 3, 8), (10, 4, None, 0.5, 2), (10, 4, 7, None, 7),
     (3, 16, None, 1, 1)],
)  # fmt: skip
def test_steps_of_a_run(
    items: int, batch_size: int, steps: int | None, epochs: float | None, expected: int
) -> None:
    assert total_steps(items, batch_size, steps, epochs) == expected


@pytest.mark.parametrize(
    ("steps", "epochs", "batch_size", "message"),
    [
        (None, None, 4, "datamodule.steps=None and datamodule.epochs=None"),
        (3, 1.0, 4, "datamodule.steps=3 and datamodule.epochs=1.0"),
        (0, None, 4, "datamodule.steps=0"),
        (None, 0, 4, "datamodule.steps=0"),
        (3, None, 0, "datamodule.batch_size=0"),
    ],
)
def test_lengths_that_cannot_work_are_refused(
    steps: int | None, epochs: float | None, batch_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        StepDataModule([1], [], batch_size, steps, epochs, seed=0)


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(ValueError, match="no training items"):
        StepDataModule([], [1], 2, 3, None, seed=0)


class Recorder(L.LightningModule):
    """Records the items of each batch. It stops or saves at the steps that are set."""

    def __init__(self, stop_after: int | None = None, save_to: Path | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.stop_after, self.save_to = stop_after, save_to
        self.batches: list[list[int]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.batches.append(batch.items)
        self.optimizers().step()  # type: ignore[union-attr]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        return None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 == self.stop_after:
            self.trainer.save_checkpoint(self.save_to)  # type: ignore[arg-type]
            self.trainer.should_stop = True

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(tmp_path: Path) -> None:
    def fit(module: Recorder, checkpoint: Path | None = None) -> list[list[int]]:
        trainer = L.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
 limit_val_batches=0,
        )  # fmt: skip
        datamodule = StepDataModule(list(range(7)), [], 3, 8, None, seed=4)
        trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
        return module.batches

    whole = fit(Recorder())
    assert whole == drawn(StepBatches(list(range(7)), 3, 8, seed=4))
    file = tmp_path / "at_5.ckpt"
    head = fit(Recorder(stop_after=5, save_to=file))
    assert head == whole[:5]
    assert fit(Recorder(), file) == whole[5:]
