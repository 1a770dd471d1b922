"""`rlt where <key>`: the value of a key of the composed config, and what gave it that value.

Hydra merges the configs of its defaults list in their order and then applies the command line, so
the last one that names a key decides.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf._utils import split_key
from omegaconf.errors import OmegaConfBaseException

from rlt.config.compose import Loader, loader_for
from rlt.config.suggestions import did_you_mean

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Given:
    """A source that names a key: what it is called, and the value as it is written there."""

    source: str
    value: str


class _Layers(Loader):
    """Hydra's loader, which keeps the configs that it merges, in their order."""

    merged: list[tuple[str, Any]]

    def _load_single_config(self, default: ResultDefault, repo: Any) -> ConfigResult:
        loaded = super()._load_single_config(default, repo)
        if loaded.provider == "main":
            source = f"conf/{default.config_path}.yaml"
        elif loaded.path.startswith("file://"):
            source = f"{loaded.path.removeprefix('file://')}/{default.config_path}.yaml"
        else:
            source = "set by Hydra"
        # A copy, as Hydra merges later configs into the nodes of this one.
        self.merged.append((source, copy.deepcopy(loaded.config)))
        return loaded


def where(key: str, arguments: list[str]) -> int:
    """Print the value of a key and its sources, the decisive one first.

    A key with others below it is printed as a line for each of them, with the decisive source.

    Args:
        arguments: overrides, and options such as `--config-dir`, as for a run.

    Returns:
        The exit status, 0.

    Raises:
        HydraException: the config does not compose.
        ValueError: the composed config has no such key.
    """
    options = get_args_parser().parse_args(arguments)
    loader, name = loader_for(options, _Layers), options.config_name or "config"
    loader.merged = []
    cfg = loader.load_configuration(name, options.overrides, RunMode.RUN)
    layers, loader.merged = loader.merged, []
    found = loader.compute_defaults_list(name, options.overrides, RunMode.RUN)
    _require(cfg, key)
    leaves = list(_leaves(cfg, key))
    for leaf in leaves:
        first, *others = sources(leaf, layers, found.config_overrides)
        value = _value(cfg, leaf)
        if len(leaves) > 1:
            print(f"{leaf} = {value}  ({first.source})")
            continue
        written = "" if value == first.value else f": {first.value}"
        print(f"{leaf} = {value}\n  {first.source}{written}")
        for other in others:
            print(f"  {other.source}: {other.value}, overridden")
    return 0


def sources(key: str, layers: list[tuple[str, Any]], overrides: list[Override]) -> Iterator[Given]:
    """What gives a key a value, in the order of precedence; at least one.

    Args:
        layers: (name, config) in the order in which they are merged.
        overrides: those of the command line that set values.
    """
    parts = split_key(key)
    for override in reversed(overrides):
        above = split_key(override.key_or_group)
        if parts[: len(above)] != above:
            continue
        value = OmegaConf.create({"value": override.value()})
        if (text := _written(value, ["value", *parts[len(above) :]])) is not None:
            yield Given(f"{COMMAND_LINE}: {override.input_line}", text)
    seen = False
    for source, layer in reversed(layers):
        if (text := _written(layer, parts)) is not None:
            seen = True
            yield Given(source, text)
    if not seen:
        yield Given("set by Hydra itself", "")


def _written(node: Any, parts: list[str]) -> str | None:
    """A value as it stands in one config; None if the config gives none.

    An interpolation above the key gives the key its value as well.
    """
    for count, part in enumerate(parts, start=1):
        try:
            node = node._get_node(int(part) if isinstance(node, ListConfig) else part)
        except (OmegaConfBaseException, ValueError, IndexError):
            return None
        if not isinstance(node, Node) or node._is_missing():
            return None
        last = count == len(parts)
        if node._is_interpolation() or (last and not _has_keys(node)):
            text = _text(node._value() if node._is_interpolation() else node)
            return text if last else f"{'.'.join(parts[:count])} is {text}"
        if not isinstance(node, DictConfig | ListConfig) or node._is_none():
            return None
    return None


def _require(cfg: DictConfig, key: str) -> None:
    """Raises ValueError if there is no such key, with the names that were perhaps meant."""
    node: Any = cfg
    parts = split_key(key)
    for place, part in enumerate(parts):
        names = list(map(str, node)) if isinstance(node, DictConfig) else []
        if isinstance(node, ListConfig):
            names = list(map(str, range(len(node))))
        if part not in names:
            at = ".".join(parts[: place + 1])
            raise ValueError(
                f"{at}: the composed config has no such key{did_you_mean(part, names)}; give the "
                "stage or experiment that has it, such as stage=teacher_rl"
            )
        here = ".".join(parts[: place + 1])
        node = OmegaConf.select(cfg, here, throw_on_resolution_failure=False)


def _has_keys(node: Any) -> bool:
    return isinstance(node, DictConfig) and not node._is_none() and len(node) > 0


def _leaves(cfg: DictConfig, key: str) -> Iterator[str]:
    """The keys with plain values or lists at and below a key, in the order of the config."""
    node = OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
    if not _has_keys(node):
        yield key
        return
    for child in map(str, node):
        yield from _leaves(cfg, f"{key}.{child}")


def _value(cfg: DictConfig, key: str) -> str:
    """The resolved value as text; as it is written where it has no value before the run."""
    try:
        return _text(OmegaConf.select(cfg, key, throw_on_missing=True))
    except OmegaConfBaseException:
        return _written(cfg, split_key(key)) or "???"


def _text(value: Any) -> str:
    if isinstance(value, Node):
        value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value._value()
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
