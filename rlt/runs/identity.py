"""The identity of a run: a key of its config, and the differences between two configs."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlt import __version__

# These keys do not change a result. They set where it is stored and how it is monitored.
_NOT_IN_KEY = ("output_dir", "note", "check", "probe", "logger", "cache_dir", "accept_changes")
_HARDWARE_NOT_IN_KEY = "memory_gb"  # only the plan reads it
_CALLBACKS_NOT_IN_KEY = ("checkpoint", "hacking", "lines", "progress")


def config_key(cfg: DictConfig, inputs: Mapping[str, str] | None = None) -> str:
    """Return a hex digest of length 16 of everything in a config that decides the result.

    Args:
        inputs: config key of a path → fingerprint of the content there, which replaces the path.
    """
    content = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    assert isinstance(content, dict)
    for key in _NOT_IN_KEY:
        content.pop(key, None)
    for key in _CALLBACKS_NOT_IN_KEY:
        (content.get("callbacks") or {}).pop(key, None)
    (content.get("hardware") or {}).pop(_HARDWARE_NOT_IN_KEY, None)
    content |= dict(inputs or {})
    text = json.dumps([__version__, content], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def config_changes(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Return dotted key → (old value, new value) where two configs differ.

    A missing value is `-`. Keys that do not change a result (`_NOT_IN_KEY`) are left out.
    """
    before, after = (flatten(OmegaConf.to_container(cfg, resolve=True)) for cfg in (old, new))
    return {
        key: (before.get(key, "-"), after.get(key, "-"))
        for key in sorted(before.keys() | after.keys())
        if before.get(key, "-") != after.get(key, "-")
        and key.split(".")[0] not in _NOT_IN_KEY
        and key != f"hardware.{_HARDWARE_NOT_IN_KEY}"
    }


def flatten(content: Any, prefix: str = "") -> dict[str, Any]:
    """Return dotted key → value of nested mappings; an empty mapping counts as a value."""
    if isinstance(content, dict) and content:
        return {
            name: value
            for key, child in content.items()
            for name, value in flatten(child, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    return {prefix: content}
