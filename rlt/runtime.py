"""What decides a run's result, and what it is made with; objects built from config nodes."""

import copy
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rlt import __version__
from rlt.checks import check_resolved
from rlt.targets import raise_if_any

# What does not change a result: where it is put, how it is watched.
_NOT_IN_KEY = ("output_dir", "note", "check", "probe", "logger", "store_dir", "accept_changes")
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
    """A node's `_target_` with its keys bound, to be called with the rest.

    Interpolations are resolved once, and what they give is checked: Hydra would resolve a second
    time, and an earlier check may have seen other values.

    Raises:
        ConfigError: a target, or a key beside it, is not allowed.
    """
    path = node._get_full_key(None)
    resolved = copy.deepcopy(node)  # with the same parent, which interpolations refer to
    resolved._set_flag(["readonly", "struct"], [False, False])
    OmegaConf.resolve(resolved)
    plain = OmegaConf.create(OmegaConf.to_container(resolved, resolve=False))
    assert isinstance(plain, DictConfig)
    raise_if_any(check_resolved(plain, path))
    return instantiate(plain, _partial_=True, _convert_="all")


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


def write_text(path: Path, text: str) -> None:
    """Write atomically: a reader sees the old file or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Write atomically, as JSON."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


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
