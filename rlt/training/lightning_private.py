"""Everything of Lightning that this package uses and that Lightning does not document.

Lightning's own checkpoints cannot give a run that is resumed bit for bit; what is here mends that.
Each function says which private name it uses and why; tests/training/test_lightning_private.py
has a test for each, which fails when an upgrade of Lightning changes one of them. Written for
lightning 2.6.
"""

from typing import Any

import lightning as L


def forget_logged_values(trainer: L.Trainer) -> None:
    """Forget what earlier steps logged, so that a step logs what it measured itself.

    Uses `Trainer._results`, the collection of the running loop's values. Lightning has no public
    way to clear it within an epoch.
    """
    results: Any = trainer._results
    results.clear()


def dump_checkpoint(trainer: L.Trainer) -> dict[str, Any]:
    """The content of a checkpoint as it is now; tensors are the live ones, not copies.

    Uses `Trainer._checkpoint_connector.dump_checkpoint`. `Trainer.save_checkpoint`, the public way,
    writes a file at once, where parts of the state belong to an earlier moment than others.
    """
    state: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    return state


def saved_progress(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """How far the training of a checkpoint had come; a change changes the checkpoint.

    Uses the layout of a checkpoint's loops: `current.ready` is the number of steps that were begun,
    `is_last_batch` whether the last of them ended the training.
    """
    progress: dict[str, Any] = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return progress


def steps_begun(trainer: L.Trainer) -> int:
    """Training steps that were begun, those before the checkpoint that was loaded included.

    Uses `fit_loop.epoch_loop.batch_progress`.
    """
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)


def validate_within_fit(trainer: L.Trainer) -> None:
    """Run the validation that belongs to the last step, as if that step had just ended.

    Uses `fit_loop.epoch_loop.val_loop` and its `restarting`: Lightning takes the validation at the
    checkpoint for done. `Trainer.validate`, the public way, cannot be called within a fit.
    """
    val_loop = trainer.fit_loop.epoch_loop.val_loop
    val_loop.restarting = False
    trainer.validating = True
    val_loop.run()
    trainer.training = True


def count_last_step(trainer: L.Trainer) -> None:
    """Count the last step of a finished training as logged.

    Uses `fit_loop.epoch_loop._batches_that_stepped`, the step of Lightning's loggers, which
    Lightning otherwise raises when the next step begins.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped += 1


def stop_alone_on_sigterm(trainer: L.Trainer) -> None:
    """Have a rank that receives SIGTERM take note of it by itself.

    Uses `Trainer._signal_connector._sigterm_notifier_fn`, which runs within the signal handler and
    there waits for the other ranks. These may be waiting for this rank elsewhere, or be gone.
    """
    connector: Any = trainer._signal_connector

    def note(signum: Any, frame: Any) -> None:
        connector.received_sigterm = True

    connector._sigterm_notifier_fn = note
