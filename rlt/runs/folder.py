"""The run folder: which config owns it, what it records, and when a run may go on in it.

One rule covers new, repeated and resumed runs. A folder belongs to the config whose key is in its
manifest. The same config resumes the run, or finds that it has finished. Another config may resume
it only if all differences are in `MAY_CHANGE` or in the config's `accept_changes`.
"""

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from rlt.config.suggestions import did_you_mean
from rlt.runs.environment import environment
from rlt.runs.files import read_json, write_json, write_text
from rlt.runs.identity import config_changes, flatten

log = logging.getLogger(__name__)

# These keys, and all keys below them, may change when a run is resumed. They set how long it
# trains, how it is monitored, and how its batches are split to fit the machine.
MAY_CHANGE = (
    "datamodule.epochs",
    "datamodule.steps",
    "callbacks.checkpoint",
    "callbacks.hacking",
    "callbacks.lines",
    "callbacks.progress",
    "hardware.devices",
    "hardware.generation_token_budget",
    "hardware.gradient_checkpointing",
    "hardware.num_nodes",
    "hardware.threads",
    "hardware.tokens_per_micro_batch",
    "module.samples_per_step",
    "reward.terms.correctness.rollout.token_budget",
    "rollout.token_budget",
    "trainer.devices",
    "trainer.log_every_n_steps",
    "trainer.num_nodes",
)
_LENGTH = ("datamodule.epochs", "datamodule.steps")
_LOCK = ".lock"
_CLAIM = ("manifest.json", "config.yaml", "composed.yaml")
_NOTHING_MADE = {_LOCK, *_CLAIM, *(f"{name}.tmp" for name in _CLAIM)}
_SECONDS_TO_WAIT = 60
_SHOWN = 3


class RunRefusedError(ValueError):
    """The run may not go on as requested; its folder must stay as it is."""


class RunFolder:
    """Claims a folder for a config and keeps its manifest.

    Args:
        key: identifies the config and everything that it reads (`config_key`).
        inputs: config key of a path → fingerprint of the content at that path.
        metadata: further entries of the manifest (command, overrides, …).
        walked_again: a finished run is run again. Pipelines need this, as each step decides whether
            its result is still valid. Comparisons need it, as there may be new runs to compare.
        rewritten: another config may replace the run, because it holds only a page that can be
            written again.

    Attributes:
        status: `new`, `resumed` (the run goes on) or `finished`.

    If a run failed or was interrupted before it made anything, the next config may claim its
    folder. No other process can claim a folder until `release` is called.

    Raises:
        ValueError: the folder holds a run of another config, or files that belong to no run, or
            another process is using it.
    """

    def __init__(
        self,
        folder: Path,
        cfg: DictConfig,
        key: str,
        inputs: Mapping[str, str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        walked_again: bool = False,
        rewritten: bool = False,
    ) -> None:
        self.folder = folder
        self.key = key
        self.walked_again = walked_again
        self.rewritten = rewritten
        self.manifest: dict[str, Any] = {}
        if not (folder / "manifest.json").is_file() and (strangers := self._made()):
            raise ValueError(
                f"output_dir={folder} is not empty and holds no run (found "
                f"{', '.join(sorted(strangers)[:_SHOWN])}); choose another output_dir"
            )
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / _LOCK)
        self._acquire()
        try:
            self.status = self._claim(cfg, dict(inputs or {}))
            if self.status != "finished":
                self._begin(cfg, dict(inputs or {}), dict(metadata or {}))
        except BaseException:
            self.release()
            raise

    def _acquire(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            log.info("%s: waiting for another process that works here to end", self.folder)
            try:
                self._lock.acquire(timeout=_SECONDS_TO_WAIT)
            except Timeout as error:
                raise ValueError(
                    f"output_dir={self.folder} is in use: another process has been working in it "
                    f"for {_SECONDS_TO_WAIT} s; wait for its end, or choose another output_dir"
                ) from error

    def release(self) -> None:
        """Let other processes claim the folder."""
        self._lock.release()

    def _claim(self, cfg: DictConfig, inputs: dict[str, str]) -> str:
        """Return the status of the folder for this config; `manifest` keeps a run to resume."""
        manifest = self.folder / "manifest.json"
        if not manifest.is_file():
            return "new"
        self.manifest = read_json(manifest)
        self._require_known(cfg)
        changes: dict[str, Any] = {}
        if self.manifest["key"] != self.key:
            # Replacing the run is safe if it made nothing, or only a page that can be rewritten.
            if self._made_nothing() or self.rewritten:
                self.manifest = {}
                return "new"
            changes = self._changes(cfg, inputs)
        finished = self.manifest.get("status") == "finished"
        if finished and not self.walked_again:
            if not any(_below(key, _LENGTH) for key in changes):
                return "finished"
            for key in _LENGTH:
                old, new = changes.get(key, (0, 0))
                if old is not None and new is not None and new < old:
                    raise ValueError(
                        f"{key}={new}: this run has been trained to its end, {old}; give more, or "
                        "choose another output_dir"
                    )
            if not (self.folder / "checkpoints" / "manifest.json").is_file():
                raise ValueError(
                    f"{self.folder} has no checkpoints any more: there is nothing to train on "
                    "from; choose another output_dir"
                )
            log.info("%s: trained to its end, going on for longer", self.folder)
        if changes:
            told = {key: list(pair) for key, pair in changes.items()}
            log.info("going on with %s", _shown(changes, "before", "now", len(changes)))
            self.manifest.setdefault("went_on_with", []).append({"at": _now(), "changes": told})
        return "resumed"

    def _require_known(self, cfg: DictConfig) -> None:
        """Raise ValueError for a name in `accept_changes` that neither config has."""
        if not cfg.get("accept_changes"):
            return
        saved = self.folder / "config.yaml"
        configs = [cfg, OmegaConf.load(saved)] if saved.is_file() else [cfg]
        keys = {key for config in configs for key in flatten(OmegaConf.to_container(config))}
        for name in cfg.accept_changes:
            if not any(_below(key, (name,)) for key in keys):
                raise ValueError(f"accept_changes: no key {name}{did_you_mean(name, sorted(keys))}")

    def _changes(self, cfg: DictConfig, inputs: dict[str, str]) -> dict[str, tuple[Any, Any]]:
        """Return the allowed differences from the run that began here: key → (old, new).

        Raises:
            ValueError: a key differs that may not change and was not accepted.
        """
        saved = self.folder / "config.yaml"
        changes = config_changes(OmegaConf.load(saved), cfg) if saved.is_file() else {}
        was = self.manifest.get("inputs") or {}
        changes |= {
            f"contents of {key}": (was.get(key, "-"), inputs.get(key, "-"))
            for key in sorted(was.keys() | inputs.keys())
            if was.get(key) != inputs.get(key)
        }
        trains = cfg.get("datamodule") is not None
        allowed = (*MAY_CHANGE, *cfg.accept_changes) if trains else ()
        refused = {
            key: pair
            for key, pair in changes.items()
            if not _below(key.removeprefix("contents of "), allowed)
        }
        if refused or not changes:
            if not refused:
                raise ValueError(
                    f"output_dir={self.folder} holds a run of the same config that another version "
                    "of rlt has made; choose another output_dir"
                )
            what = _shown(refused, "there", "here")
            keys = ",".join(key.removeprefix("contents of ") for key in refused)
            remedy = f", or go on all the same: accept_changes=[{keys}]" if trains and keys else ""
            raise ValueError(
                f"output_dir={self.folder} holds a run of another config ({what}); choose another "
                f"output_dir, go on as it began: rlt resume {self.folder}{remedy}"
            )
        return changes

    def _made(self) -> set[str]:
        """Return the names in the folder besides those that every claim makes."""
        found = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        return found - _NOTHING_MADE

    def _made_nothing(self) -> bool:
        """Return whether the run that claimed the folder left nothing that could be lost."""
        return self.manifest["status"] != "finished" and not self._made()

    def _begin(self, cfg: DictConfig, inputs: dict[str, str], metadata: dict[str, Any]) -> None:
        self.started = time.time()
        files = [self.folder / name for name in _CLAIM]
        self._before = {file: file.read_text("utf-8") for file in files if file.is_file()}
        self.manifest.pop("error", None)
        self.manifest |= {
            "key": self.key,
            "status": "running",
            "stage": cfg.stage,
            "seed": cfg.seed,
            "cwd": os.getcwd(),
            "began": [*self.manifest.get("began", []), _now()],
            "inputs": inputs or self.manifest.get("inputs", {}),
            **environment(),
            **metadata,
        }
        # The manifest comes first, so that a process killed in between still owns the folder.
        write_json(self.folder / "manifest.json", self.manifest)
        write_text(self.folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
        # `rlt resume` and the steps of a pipeline change keys that interpolations refer to.
        write_text(self.folder / "composed.yaml", OmegaConf.to_yaml(cfg))

    def take_back(self) -> None:
        """Restore the manifest and the configs to what they were before the claim."""
        for file, text in self._before.items():
            write_text(file, text)

    def record(self, **metadata: Any) -> None:
        """Add metadata (data report, fingerprints) to the manifest."""
        self.manifest |= metadata
        write_json(self.folder / "manifest.json", self.manifest)

    def finish(self, metrics: dict[str, float]) -> None:
        """Write metrics.json and record that the run has finished, and in how many seconds."""
        write_json(self.folder / "metrics.json", metrics)
        seconds = self.manifest.get("seconds", 0.0) + time.time() - self.started
        self.record(status="finished", ended=_now(), seconds=round(seconds, 1))

    @property
    def metrics(self) -> dict[str, float]:
        """Final metrics of a finished run."""
        metrics: dict[str, float] = read_json(self.folder / "metrics.json")
        return metrics


def _below(key: str, roots: tuple[str, ...]) -> bool:
    return any(key == root or key.startswith(f"{root}.") for root in roots)


def _shown(
    changes: Mapping[str, tuple[Any, Any]], before: str, now: str, most: int = _SHOWN
) -> str:
    """Return the first changes as text, such as `key: 1 there, 2 here; …`."""
    shown = [f"{k}: {old} {before}, {new} {now}" for k, (old, new) in list(changes.items())[:most]]
    more = f", and {len(changes) - most} more" if len(changes) > most else ""
    return "; ".join(shown) + more


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
