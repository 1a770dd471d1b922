"""The run folder: who owns it, what it records, and how objects are built from config nodes.

One rule covers a new run, a repeated one and a resumed one. A folder belongs to the config whose
key it holds: the same config goes on in it (or is told that it has finished), any other is refused.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rlt import __version__

# What does not change a result: where it is put, how it is watched.
_NOT_IN_KEY = ("output_dir", "note", "check", "logger", "store_dir")
_CALLBACKS_NOT_IN_KEY = ("checkpoint", "hacking", "lines", "progress")
_PACKAGES = (
    "torch", "lightning", "transformers", "datasets", "hydra-core", "omegaconf", "tokenizers",
    "reasoning-gym", "math-verify",
)  # fmt: skip


def build(node: DictConfig, **runtime: Any) -> Any:
    """Call a node's `_target_` with its keys and with runtime objects.

    The objects are passed in the call itself: handed to `instantiate`, models would be copied and
    dataclasses turned into configs.
    """
    return build_partial(node)(**runtime)


def build_partial(node: DictConfig) -> Any:
    """A node's `_target_` with its keys bound, to be called with the rest."""
    return instantiate(node, _partial_=True, _convert_="all")


def config_key(cfg: DictConfig, inputs: Mapping[str, str] | None = None) -> str:
    """Hex digest of length 16 over what decides a run's result.

    Args:
        inputs: config key of a path → fingerprint of what lies there, used in its place.
    """
    content = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    assert isinstance(content, dict)
    for key in _NOT_IN_KEY:
        content.pop(key, None)
    for key in _CALLBACKS_NOT_IN_KEY:
        (content.get("callbacks") or {}).pop(key, None)
    content |= dict(inputs or {})
    text = json.dumps([__version__, content], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_json(path: Path, content: Any) -> None:
    """Write atomically: a reader sees the old file or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, default=str)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


class RunFolder:
    """Claims a folder for a config and keeps its manifest.

    Attributes:
        status: `new`, `resumed` (it was begun and not finished) or `finished`.

    A run that failed or was interrupted before it made anything gives its folder to the next.

    Raises:
        ValueError: the folder holds another config's run, or files that are no run at all.
    """

    def __init__(self, folder: Path, cfg: DictConfig, key: str) -> None:
        self.folder = folder
        self.key = key
        manifest = folder / "manifest.json"
        if manifest.is_file():
            self.manifest: dict[str, Any] = read_json(manifest)
            if self.manifest["key"] != self.key:
                # What was compared may be compared otherwise: nothing but the page is lost.
                if not self._made_nothing() and not self._compares(cfg):
                    raise ValueError(
                        f"output_dir={folder} holds a run of another config "
                        f"({_difference(folder / 'config.yaml', cfg)}); choose another "
                        "output_dir, or repeat the command in its manifest.json to go on with it"
                    )
                self.manifest = {}
            # A pipeline is walked through again: its steps know best what is still good. What is
            # compared may have grown.
            again = cfg.stage in ("pipeline", "compare")
            done = self.manifest.get("status") == "finished" and not again
            self.status = "finished" if done else "resumed" if self.manifest else "new"
        else:
            strangers = [p.name for p in folder.iterdir()] if folder.is_dir() else []
            if strangers:
                raise ValueError(
                    f"output_dir={folder} is not empty and holds no run (found "
                    f"{', '.join(sorted(strangers)[:3])}); choose another output_dir"
                )
            self.status = "new"
            self.manifest = {}
        if self.status != "finished":
            folder.mkdir(parents=True, exist_ok=True)
            self._begin(cfg)

    def _compares(self, cfg: DictConfig) -> bool:
        return cfg.stage == "compare" == self.manifest.get("stage")

    def _made_nothing(self) -> bool:
        """Whether the run that claimed the folder ended before it made anything to lose."""
        ended = self.manifest["status"] in ("failed", "interrupted")
        return ended and {p.name for p in self.folder.iterdir()} <= {"config.yaml", "manifest.json"}

    def _begin(self, cfg: DictConfig) -> None:
        OmegaConf.save(cfg, self.folder / "config.yaml", resolve=True)
        self.started = time.time()
        self.manifest.pop("error", None)
        self.manifest |= {
            "key": self.key,
            "status": "running",
            "stage": cfg.stage,
            "seed": cfg.seed,
            "command": sys.argv[1:],
            "overrides": _overrides(),
            "began": [*self.manifest.get("began", []), _now()],
            **environment(),
        }
        write_json(self.folder / "manifest.json", self.manifest)

    def record(self, **facts: Any) -> None:
        """Add facts (data report, fingerprints) to the manifest."""
        self.manifest |= facts
        write_json(self.folder / "manifest.json", self.manifest)

    def finish(self, metrics: dict[str, float]) -> None:
        write_json(self.folder / "metrics.json", metrics)
        seconds = self.manifest.get("seconds", 0.0) + time.time() - self.started
        self.record(status="finished", ended=_now(), seconds=round(seconds, 1))

    @property
    def metrics(self) -> dict[str, float]:
        """Final metrics of a finished run."""
        metrics: dict[str, float] = read_json(self.folder / "metrics.json")
        return metrics


def _difference(saved: Path, cfg: DictConfig) -> str:
    """The first keys in which a saved config and this one differ."""
    if not saved.is_file():
        return "its config.yaml is gone"
    changes = config_changes(OmegaConf.load(saved), cfg)
    shown = [f"{k}: {old} there, {new} here" for k, (old, new) in list(changes.items())[:3]]
    more = f", and {len(changes) - 3} more" if len(changes) > 3 else ""
    return ("; ".join(shown) + more) or "its inputs have changed"


def config_changes(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted key → (old value, new value), `-` where there is none; not where results are put."""
    before, after = (flatten(OmegaConf.to_container(cfg, resolve=True)) for cfg in (old, new))
    return {
        key: (before.get(key, "-"), after.get(key, "-"))
        for key in sorted(before.keys() | after.keys())
        if before.get(key, "-") != after.get(key, "-") and key.split(".")[0] not in _NOT_IN_KEY
    }


def flatten(content: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key → value of nested mappings; an empty mapping is a value."""
    if isinstance(content, dict) and content:
        return {
            name: value
            for key, child in content.items()
            for name, value in flatten(child, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    return {prefix: content}


def _overrides() -> list[str]:
    """What this job was asked for: of a sweep, the values it was given."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def environment() -> dict[str, Any]:
    """What a run computes with, as its manifest records it: code, packages, machine."""
    return {
        "rlt": __version__,
        "git": git_revision(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "hardware": hardware_facts(),
    }


@functools.cache
def git_revision() -> str | None:
    """Revision of the checkout this package runs from, `+changes` if it is not clean."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
        return done.stdout.strip()

    try:
        if not Path(git("rev-parse", "--show-toplevel")).samefile(folder.parent):
            return None  # installed below some other project's checkout
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def hardware_facts() -> dict[str, Any]:
    import torch

    cuda = torch.cuda.is_available()
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if cuda
        else [],
    }


def peak_memory_bytes() -> int:
    """Peak resident memory of this process so far.

    On Linux from VmHWM: ru_maxrss of a process starts at the peak of the one that started it.
    """
    import resource

    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
    if found:
        return found[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
