"""Checkpoint files: whole or not used, and what is said when the disk is full."""

import logging
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlt.runs.files import read_json
from rlt.training.callbacks import Checkpoint
from rlt.training.checkpoints import CheckpointError, listed, newest_whole, write_checkpoint

CONTENT = {"state_dict": {"weight": torch.arange(1000.0)}, "random": [torch.zeros(4)]}
BYTES = 4 * 1004


def write(folder: Path, *steps: int, keep: int = 2) -> Path:
    for step in steps:
        write_checkpoint(folder, step, CONTENT, keep)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept_and_listed(tmp_path: Path) -> None:
    write(tmp_path, 2, 4, 6)
    files = ["step=00000004.ckpt", "step=00000006.ckpt"]
    assert names(tmp_path) == ["manifest.json", *files]
    assert [row["step"] for row in read_json(tmp_path / "manifest.json")] == [4, 6]
    assert newest_whole(tmp_path) == tmp_path / files[1]
    loaded = torch.load(tmp_path / files[1], weights_only=True)
    assert torch.equal(loaded["state_dict"]["weight"], torch.arange(1000.0))


def test_without_checkpoints_there_is_none(tmp_path: Path) -> None:
    assert newest_whole(tmp_path / "checkpoints") is None


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = pytest.mark.parametrize(
    ("damage", "told"),
    [(cut, "bytes, not the"), (flip, "other content"), (Path.unlink, "is missing")],
)


@DAMAGES
def test_a_damaged_one_is_set_aside(
    tmp_path: Path, damage: Callable[[Path], Any], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    newest = write(tmp_path, 2, 4) / "step=00000004.ckpt"
    damage(newest)
    was = newest.read_bytes() if newest.exists() else None
    with caplog.at_level(logging.WARNING):
        assert newest_whole(tmp_path) == tmp_path / "step=00000002.ckpt"
    assert len(caplog.messages) == 1
    assert "checkpoint step=00000004.ckpt" in caplog.text and told in caplog.text
    aside = tmp_path / "step=00000004.ckpt.damaged"
    assert (aside.read_bytes() if aside.exists() else None) == was
    caplog.clear()
    assert newest_whole(tmp_path) == tmp_path / "step=00000002.ckpt"
    assert not caplog.messages
    write(tmp_path, 4)
    assert newest_whole(tmp_path) == newest
    assert aside.exists() == (was is not None)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(tmp_path: Path) -> None:
    write(tmp_path, 2, 4)
    cut(tmp_path / "step=00000002.ckpt")
    flip(tmp_path / "step=00000004.ckpt")
    for _ in range(2):  # told each time: nothing was moved
        with pytest.raises(CheckpointError, match=r"00000004.*content.*00000002.*bytes.*delete"):
            newest_whole(tmp_path)


@pytest.mark.parametrize("content", [None, "[{", '[{"step": 2}]', '{"step": 2}'])
def test_without_its_manifest_no_checkpoint_is_trusted(tmp_path: Path, content: str | None) -> None:
    manifest = write(tmp_path, 2) / "manifest.json"
    manifest.unlink()
    if content is not None:
        manifest.write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read.*delete the folder"):
        newest_whole(tmp_path)


def test_what_was_not_written_to_its_end_is_not_used(tmp_path: Path) -> None:
    write(tmp_path, 2)
    unlisted = tmp_path / "step=00000004.ckpt"
    unlisted.write_bytes(b"whole, perhaps")
    (tmp_path / "step=00000006.tmp").write_bytes(b"half")
    assert newest_whole(tmp_path) == tmp_path / "step=00000002.ckpt"
    assert not (tmp_path / "step=00000006.tmp").exists()
    write(tmp_path, 5)
    assert not unlisted.exists()


def test_a_full_disk_is_told_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 2)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError) as refused:
        write(tmp_path, 4)
    message = str(refused.value)
    assert "the checkpoint of step 4" in message
    assert f"needs {BYTES:,} bytes, 1,000 are free, {BYTES - 1000:,} are missing" in message
    assert "the same command then goes on from step 2" in message
    assert names(tmp_path) == ["manifest.json", "step=00000002.ckpt"]


WRITE = """
import sys, torch
from pathlib import Path
from rlt.training.checkpoints import CheckpointError, write_checkpoint
try:
    write_checkpoint(Path(sys.argv[1]), 4, {"weight": torch.zeros(100_000)}, 2)
except CheckpointError as error:
    print(error)
"""


def test_a_write_that_fails_leaves_older_ones(tmp_path: Path) -> None:
    """A limit on the size of files stands for a disk that fills up while it is written to."""
    write(tmp_path, 2)
    done = subprocess.run(
        [sys.executable, "-c", WRITE, str(tmp_path)], capture_output=True, text=True, check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )  # fmt: skip
    assert "the checkpoint of step 4 could not be written" in done.stdout
    assert "(File too large): it needs 400,000 bytes" in done.stdout
    assert "goes on from step 2" in done.stdout
    assert names(tmp_path) == ["manifest.json", "step=00000002.ckpt"]
    assert [entry.step for entry in listed(tmp_path)] == [2]


def test_tied_weights_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(1000)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5000))
    write_checkpoint(tmp_path, 2, {"state_dict": {"embed": weight, "head": weight}}, 2)
    assert newest_whole(tmp_path) is not None


@pytest.mark.parametrize(("every_steps", "keep"), [(0, 2), (1, 1)])
def test_numbers_that_are_too_small(every_steps: int, keep: int) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        Checkpoint(every_steps, keep)
