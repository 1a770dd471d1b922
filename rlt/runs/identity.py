"""What decides a run's result: its config, and what tells two configs apart."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlt import __version__

# What does not change a result: where it is put, how it is watched.
_NOT_IN_KEY = ("output_dir", "note", "check", "probe", "logger", "cache_dir", "accept_changes")
_CALLBACKS_NOT_IN_KEY = ("checkpoint", "hacking", "lines", "progress")


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
