"""The run folder of several ranks: rank 0 claims it and writes, the others look on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from rlt.runs import ranks
from rlt.runs.folder import RunFolder


class FollowedRun(RunFolder):
    """What a rank other than the first knows of the run folder; nothing here writes.

    Args:
        folder: of the run.
        key: see `RunFolder`.
        status: as rank 0 has found it.
        manifest: as rank 0 has begun it.
    """

    def __init__(self, folder: Path, key: str, status: str, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.key = key
        self.status = status
        self.manifest = manifest

    def record(self, **metadata: Any) -> None:
        """Add metadata to this rank's copy of the manifest."""
        self.manifest |= metadata

    def finish(self, metrics: dict[str, float]) -> None:
        """Rank 0 does it."""

    def release(self) -> None:
        """Rank 0 does it."""

    def take_back(self) -> None:
        """Rank 0 does it."""


def claim(
    folder: Path,
    cfg: DictConfig,
    key: str,
    inputs: Mapping[str, str],
    metadata: Mapping[str, Any],
    walked_again: bool,
    rewritten: bool,
) -> RunFolder:
    """Claim a run folder (see `RunFolder`) on rank 0, and tell the other ranks what was found.

    Raises:
        ValueError: the folder cannot be claimed.
        RankStoppedError: so rank 0 has told the others.
    """
    claimed: list[RunFolder] = []

    def found() -> tuple[str, dict[str, Any]]:
        run = RunFolder(folder, cfg, key, inputs, metadata, walked_again, rewritten)
        claimed.append(run)
        return run.status, run.manifest

    status, manifest = ranks.from_main(found, f"claiming {folder}")
    return claimed[0] if claimed else FollowedRun(folder, key, status, manifest)
