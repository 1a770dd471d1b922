"""Files of a run that were replaced by ones that would run code: they are read as data alone."""

import contextlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.stages.cli import here, stage


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_a_checkpoint_that_is_a_hostile_pickle_does_not_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base.parent, tmp_path / "pretrain")
    run, mark = tmp_path / "pretrain", tmp_path / "ran"
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"status": "interrupted"}))
    (run / "metrics.json").unlink()
    checkpoints = list((run / "checkpoints").iterdir())
    assert checkpoints
    for file in checkpoints:
        torch.save({"state_dict": Hostile(mark)}, file)
    # How the run says so is not this test's business.
    with contextlib.suppress(SystemExit, pickle.UnpicklingError):
        here(stage("pretrain", "output_dir=pretrain"), tmp_path, monkeypatch)
    assert not mark.exists()
    torch.load(checkpoints[0], weights_only=False)
    assert mark.exists()  # it would have run
