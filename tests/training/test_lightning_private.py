"""Lightning's private names still do what `rlt.training.lightning_private` takes them to do."""

from pathlib import Path
from typing import Any

import lightning as L
import torch

from rlt.data.batches import Batch, StepDataModule
from rlt.training.lightning_private import (
    count_last_step,
    dump_checkpoint,
    forget_logged_values,
    saved_progress,
    steps_begun,
    validate_within_fit,
)
from tests.training.fitting import trainer

STEPS = 3


class OneWeight(L.LightningModule):
    """Logs `every` at each step and `first` at the first alone; counts its validations."""

    def __init__(self, forgets: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.forgets = forgets
        self.validated_at: list[tuple[int, bool]] = []

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self.forgets:
            forget_logged_values(self.trainer)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(-self.weight)
        optimizer.step()
        self.log("every", float(batch_idx))
        if batch_idx == 0:
            self.log("first", 1.0)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated_at.append((self.global_step, self.trainer.validating))


class Look(L.Callback):
    """Calls a function at the end of each step."""

    def __init__(self, look: Any) -> None:
        self.look = look

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.look(trainer)


def fit(module: OneWeight, folder: Path, look: Any, **options: Any) -> L.Trainer:
    made = trainer(folder, callbacks=[Look(look)], **options)
    made.fit(module, datamodule=StepDataModule([1, 2], [1], 1, STEPS, None, 0))
    return made


def test_logged_values_are_forgotten(tmp_path: Path) -> None:
    shown: dict[bool, list[set[str]]] = {}
    for forgets in (False, True):
        seen = shown.setdefault(forgets, [])
        fit(OneWeight(forgets), tmp_path, lambda t, seen=seen: seen.append({*t._results}))
    of_first, of_every = "training_step.first", "training_step.every"
    assert shown[True] == [{of_first, of_every}, {of_every}, {of_every}]
    assert shown[False][1] == {of_first, of_every}  # why it has to be done by hand


def test_a_dump_holds_the_live_tensors_and_the_progress(tmp_path: Path) -> None:
    dumps: list[dict[str, Any]] = []
    module = OneWeight()

    def look(made: L.Trainer) -> None:
        dumps.append(dump_checkpoint(made))
        assert steps_begun(made) == len(dumps)

    fit(module, tmp_path, look)
    assert {"state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks"} <= {*dumps[0]}
    weight = dumps[0]["state_dict"]["weight"]
    assert weight.data_ptr() == module.weight.data_ptr() and float(weight) == STEPS
    assert [saved_progress(dump)["current"]["ready"] for dump in dumps] == [1, 2, 3]
    assert [saved_progress(dump)["is_last_batch"] for dump in dumps] == [False, False, True]


def test_the_validation_of_a_checkpoint_s_step_can_be_run(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"

    def save(made: L.Trainer) -> None:
        if made.global_step == 2:
            made.save_checkpoint(file)

    fit(OneWeight(), tmp_path, save)

    class Validate(L.Callback):
        def on_train_start(self, made: L.Trainer, module: L.LightningModule) -> None:
            assert steps_begun(made) == 2
            validate_within_fit(made)
            assert made.training and not made.validating

    module = OneWeight()
    made = trainer(tmp_path, callbacks=[Validate()], limit_val_batches=1.0, val_check_interval=3)
    datamodule = StepDataModule([1, 2], [1], 1, STEPS, None, 0)
    made.fit(module, datamodule=datamodule, ckpt_path=file, weights_only=True)
    assert module.validated_at == [(2, True), (STEPS, True)]


def test_the_last_step_can_be_counted(tmp_path: Path) -> None:
    made = fit(OneWeight(), tmp_path, lambda _: None)
    before = made.fit_loop.epoch_loop._batches_that_stepped
    count_last_step(made)
    assert made.fit_loop.epoch_loop._batches_that_stepped == before + 1
