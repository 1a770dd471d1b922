"""Objects built from config nodes: single parts, and a whole stage with all of its parts.

A stage is a dataclass whose fields are the keys of its config. `build_stage` builds every part that
needs neither data nor weights, once, and tells all that is wrong together; the run goes on with the
same objects.
"""

import collections.abc
import copy
import functools
import inspect
from collections.abc import Callable, Collection
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from rlt.config.allowed_targets import ConfigError, raise_if_any, resolve_target
from rlt.config.check import check_resolved, check_targets
from rlt.config.fields import field_errors, field_types


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
        ConfigError: the target's `settings_errors`, if it has that method, refuse the keys.
    """
    path = node._get_full_key(None)
    resolved = copy.deepcopy(node)  # with the same parent, which interpolations refer to
    resolved._set_flag(["readonly", "struct"], [False, False])
    OmegaConf.resolve(resolved)
    plain = OmegaConf.create(OmegaConf.to_container(resolved, resolve=False))
    assert isinstance(plain, DictConfig)
    raise_if_any(check_resolved(plain, path))
    bound = instantiate(plain, _partial_=True, _convert_="all")
    find_errors = getattr(bound.func, "settings_errors", None)
    if find_errors is not None:
        known = inspect.signature(find_errors).parameters
        if errors := find_errors(**{k: v for k, v in bound.keywords.items() if k in known}):
            raise ConfigError([f"{path}.{error}" for error in errors])
    return bound


def bound_settings(part: Callable[..., Any]) -> dict[str, Any]:
    """The keys of a config node that `build_partial` has bound."""
    assert isinstance(part, functools.partial)
    return part.keywords


def stage_class(cfg: DictConfig) -> type[Any]:
    """The class of a config's stage, which its `_target_` names.

    Raises:
        ValueError: there is none, or it may not be built.
    """
    target = cfg.get("_target_")
    if not isinstance(target, str):
        raise ValueError(
            "this config names no stage: its key _target_ is missing. Choose one by stage=…"
        )
    try:
        found: Any = resolve_target(target)
    except ValueError as error:
        raise ValueError(f"_target_={target}: {error}") from error
    if not is_stage(found):
        raise ValueError(f"_target_={target}: is no stage; a subclass of rlt.stages.stage.Stage is")
    return found


def is_stage(found: Any) -> bool:
    """Whether an object is a stage's class."""
    return is_dataclass(found) and hasattr(found, "config_errors")


def build_stage(cfg: DictConfig, made_later: Collection[str] = ()) -> Any:
    """A composed config's stage with all of its parts; reads no data and no weights.

    Args:
        made_later: keys of paths at which an earlier step of a pipeline will put something; the
            stage is built as if they were null.

    Raises:
        ConfigError: everything that is wrong with the config.
    """
    raise_if_any(check_targets(cfg))
    owner = stage_class(cfg)
    if hasattr(owner, "from_config"):
        return owner.from_config(cfg)
    types = field_types(owner)  # type: ignore[arg-type]
    parts: dict[str, Any] = {}
    errors: list[str] = owner.config_errors(cfg)
    for one in fields(owner):
        value = None if one.name in made_later else cfg.get(one.name)
        parts[one.name] = _part(one.name, value, types[one.name], errors)
    broken = {error.partition("=")[0].partition(".")[0].partition(":")[0] for error in errors}
    plain = {name: value for name, value in parts.items() if name not in broken}
    raise_if_any(errors + field_errors(owner, plain))
    return owner(**parts)


def _part(key: str, value: Any, hint: Any, errors: list[str]) -> Any:
    """The value of a stage's field: built, bound (where its type is a callable), or as it is."""
    if isinstance(value, DictConfig) and "_target_" in value:
        make = build_partial if _is_callable(hint) else build
        return attempt(key, lambda: make(value), errors)
    if isinstance(value, DictConfig) and key == "callbacks":
        made = {
            str(name): attempt(f"{key}.{name!s}", functools.partial(build, node), errors)
            for name, node in value.items()
            if node is not None
        }
        return {name: part for name, part in made.items() if part is not None}
    if isinstance(value, DictConfig | ListConfig):
        return OmegaConf.to_container(value, resolve=True)
    return value


def _is_callable(hint: Any) -> bool:
    alternatives = (hint, *get_args(hint)) if get_origin(hint) is not None else (hint,)
    return any(get_origin(one) is collections.abc.Callable for one in alternatives)


def attempt(key: str, make: Callable[[], Any], errors: list[str]) -> Any:
    """What `make` makes; None, and a line in `errors`, if the values are refused."""
    try:
        return make()
    except ConfigError as error:
        errors.extend(error.errors)
    except InstantiationException as error:  # a nested node refused its values
        where = str(error).partition("full_key: ")[2]
        errors.append(f"{key}.{where}: {error.__cause__}" if where else f"{key}: {error}")
    except (ValueError, OSError) as error:
        errors.append(str(error) if key in str(error) else f"{key}: {error}")
    except TypeError as error:
        errors.append(f"{key}: a value is of the wrong type: {error}")
    return None
