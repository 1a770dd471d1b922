"""The folder `checkpoints/` of a run: every file in it is whole, or is not used.

`manifest.json` lists each checkpoint with its step, bytes and SHA-256. A checkpoint is on the disk
under its final name before it is listed, and is listed before older ones are deleted. A file that
is not listed (the run was killed between the two) cannot be verified: it is ignored, and deleted
by the next one that is written.
"""

import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rlt.runs.files import read_json, write_json

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"  # folder inside a run's
_MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint could not be written, or none can be read; says what to do."""


@dataclass(frozen=True)
class Entry:
    """What the manifest says of one checkpoint."""

    step: int
    bytes: int
    sha256: str

    @property
    def name(self) -> str:
        """Its file name."""
        return _name(self.step)


def listed(folder: Path) -> list[Entry]:
    """The manifest's checkpoints, steps ascending; [] before the first one.

    Raises:
        CheckpointError: there are checkpoints, but no manifest that can be read.
    """
    file = folder / _MANIFEST
    if not file.is_file() and not any(folder.glob("step=*.ckpt")):
        return []
    try:
        return [Entry(**row) for row in read_json(file)]
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}), so none of the checkpoints beside it can be "
            f"verified; bring the file back, or delete the folder {folder} to begin anew"
        ) from error


def write_checkpoint(folder: Path, step: int, content: Mapping[str, Any], keep: int) -> None:
    """Write a checkpoint, list it, and delete all but the newest `keep`.

    Raises:
        CheckpointError: it could not be written; older ones are as they were.
    """
    temporary = (folder / _name(step)).with_suffix(".tmp")
    needed = _storage_bytes(content)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _write(folder, step, content, keep, temporary)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        # torch's writer, closed after a write that failed, raises a RuntimeError in its place
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        free = shutil.disk_usage(folder).free
        older = [entry.step for entry in listed(folder)]
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {folder} "
            f"({cause.strerror or cause}): it needs {needed:,} bytes, {free:,} "
            f"are free, {max(0, needed - free):,} are missing. Make room; the same command then "
            f"goes on from {f'step {older[-1]}' if older else 'the start'}"
        ) from error


def _write(folder: Path, step: int, content: Mapping[str, Any], keep: int, temporary: Path) -> None:
    entries = [entry for entry in listed(folder) if entry.step != step]
    if not entries:
        _list(folder, [])  # a first file killed before it is listed is then no lost manifest
    with temporary.open("wb") as file:
        torch.save(dict(content), file)
        file.flush()
        os.fsync(file.fileno())
    digest = _sha256(temporary)
    size = temporary.stat().st_size
    temporary.replace(folder / _name(step))
    _sync(folder)
    entries = sorted([*entries, Entry(step, size, digest)], key=lambda entry: entry.step)[-keep:]
    _list(folder, entries)
    for path in folder.glob("step=*.ckpt"):
        if path.name not in {entry.name for entry in entries}:
            path.unlink()


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint whose size and hash are those listed; None before the first one.

    Damaged ones that are newer are set aside as `<name>.damaged`, with a warning each.

    Raises:
        CheckpointError: all are damaged, or the manifest is.
    """
    for unfinished in folder.glob("*.tmp"):
        unfinished.unlink()
    entries = listed(folder)
    faults: dict[Entry, str] = {}
    for entry in reversed(entries):
        fault = _fault(folder / entry.name, entry)
        if fault is None:
            break
        faults[entry] = fault
    if not entries:
        return None
    if len(faults) == len(entries):
        told = "; ".join(f"{entry.name} {fault}" for entry, fault in faults.items())
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged: {told}. Bring one back from a copy, or "
            "delete the folder to begin anew"
        )
    for damaged, fault in faults.items():
        log.warning(
            "checkpoint %s %s: set aside as %s.damaged, %s is used instead",
            damaged.name, fault, damaged.name, entry.name,
        )  # fmt: skip
        path = folder / damaged.name
        if path.is_file():
            path.replace(folder / f"{damaged.name}.damaged")
    if faults:
        _list(folder, [kept for kept in entries if kept not in faults])
    return folder / entry.name


def _fault(path: Path, entry: Entry) -> str | None:
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != entry.bytes:
        return f"has {size:,} bytes, not the {entry.bytes:,} that were written"
    return None if _sha256(path) == entry.sha256 else "has other content than was written (SHA-256)"


def _list(folder: Path, entries: list[Entry]) -> None:
    write_json(folder / _MANIFEST, [asdict(entry) for entry in entries])
    _sync(folder)


def _sync(folder: Path) -> None:
    """Bring the folder's names to the disk; a file's own fsync does not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name(step: int) -> str:
    return f"step={step:08d}.ckpt"


def _storage_bytes(content: Any) -> int:
    """Bytes of all tensors, shared storage (tied weights) counted once as in the file."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in _tensors(content)}
    return sum(storage.nbytes() for storage in storages.values())


def _tensors(content: Any) -> Iterator[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, Mapping | list | tuple):
        for child in content.values() if isinstance(content, Mapping) else content:
            yield from _tensors(child)
