"""What a config may build: the allow-list, what the user adds to it, and targets found by name."""

import fnmatch
import functools
import importlib
import inspect
import logging
import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlt.config.launchers import EXTRAS, LAUNCHERS
from rlt.config.suggestions import did_you_mean

# When it is imported, here by its target, it asks for the package `kernels`, by which it would
# fetch faster kernels.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Allowed:
    """A target that may be built: an exact name, or a prefix with a star at its end."""

    name: str
    homes: tuple[str, ...]  # the resolved object must be defined in or below one of these modules
    classes_only: bool = True
    but: tuple[str, ...] = ()  # except what is in or below these modules

    def names(self, target: str) -> bool:
        """Return whether the dotted name `target` matches this entry."""
        return fnmatch.fnmatchcase(target, self.name)

    def houses(self, module: str) -> bool:
        """Return whether an object that `module` defines may be built by this entry."""
        return _below(module, self.homes) and not self.excludes(module)

    def excludes(self, name: str) -> bool:
        """Return whether `name` is in or below one of the modules in `but`."""
        return _below(name, self.but)


def _below(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


# The program itself: what it runs, reads and reports is no part of a run.
_PROGRAM = tuple(
    f"rlt.{module}"
    for module in (
        *("cli", "config", "plugins", "preflight", "report", "runs", "sweeps"),
        *("evaluation.worker", "evaluation.sandbox"),
        *("stages.run", "stages.steps", "stages.compare_jobs"),
    )
)


ALLOWED = (
    # No functions: some write files or build what they are given.
    Allowed("rlt.*", ("rlt",), but=_PROGRAM),
    Allowed("rlt.llm.tokenizers.*", ("rlt.llm.tokenizers",), classes_only=False),
    Allowed("lightning.Trainer", ("lightning.pytorch.trainer",)),
    Allowed("lightning.pytorch.Trainer", ("lightning.pytorch.trainer",)),
    Allowed("lightning.pytorch.callbacks.*", ("lightning.pytorch.callbacks",)),
    Allowed("lightning.pytorch.loggers.*", ("lightning.pytorch.loggers",)),
    Allowed("lightning.pytorch.profilers.*", ("lightning.pytorch.profilers",)),
    Allowed("lightning.pytorch.strategies.*", ("lightning.pytorch.strategies",)),
    Allowed(
        "lightning.pytorch.plugins.*", ("lightning.pytorch.plugins", "lightning.fabric.plugins")
    ),
    Allowed("torch.optim.*", ("torch.optim",)),
    Allowed(
        "torch.distributed.fsdp.wrap.size_based_auto_wrap_policy",
        ("torch.distributed.fsdp.wrap",),
        classes_only=False,
    ),
    Allowed("transformers.get_*", ("transformers.optimization",), classes_only=False),
    Allowed("bitsandbytes.optim.*", ("bitsandbytes.optim",)),
    Allowed("transformers.Adafactor", ("transformers.optimization",)),
)
# Plugins one by one: what the launchers among them are told is checked by `rlt.config.launchers`.
ALLOWED_IN_HYDRA = (
    *ALLOWED,
    Allowed("hydra.experimental.callbacks.*", ("hydra.experimental.callbacks",)),
    Allowed("rlt.stages.compare_jobs.CompareJobs", ("rlt.stages.compare_jobs",)),
    Allowed("hydra._internal.core_plugins.*", ("hydra._internal.core_plugins",)),
    Allowed("hydra_plugins.rlt_optuna.sweeper.OptunaSweeper", ("hydra_plugins.rlt_optuna",)),
    *(Allowed(name, (name.rpartition(".")[0],)) for name in LAUNCHERS),
)
ALLOW_VARIABLE = (
    "RLT_ALLOW"  # what the user trusts besides, e.g. RLT_ALLOW=my_package.*,other.Class
)


class ConfigError(ValueError):
    """What is wrong with a config, all of it.

    Attributes:
        errors: one sentence each.
    """

    def __init__(self, errors: list[str]) -> None:
        self.errors = errors
        count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
        lines = [f"  {number}. {error}" for number, error in enumerate(errors, start=1)]
        super().__init__("\n".join([f"the config has {count}:", *lines]))


def raise_if_any(errors: list[str]) -> None:
    """Raises ConfigError if there are any errors."""
    if errors:
        raise ConfigError(errors)


@functools.cache
def allowed_by_user() -> tuple[Allowed, ...]:
    """What the environment variable RLT_ALLOW names; read once. No config can set it.

    Raises:
        ConfigError: it holds something else than dotted names, each with or without `.*`.
    """
    names = [name.strip() for name in os.environ.get(ALLOW_VARIABLE, "").split(",")]
    for name in filter(None, names):
        if not all(part.isidentifier() for part in name.removesuffix(".*").split(".")):
            raise ConfigError(
                [
                    f"{ALLOW_VARIABLE}={name}: must be dotted names with commas between, such as "
                    "my_package.* or my_package.module.Class"
                ]
            )
    return tuple(
        Allowed(
            name,
            (name.removesuffix(".*") if name.endswith(".*") else name.partition(".")[0],),
            classes_only=False,
        )
        for name in filter(None, names)
    )


def resolve_target(target: str, allowed: tuple[Allowed, ...] | None = None) -> Callable[..., Any]:
    """What `target` names, if it may be built; else a ValueError that says why not.

    Args:
        allowed: what may be built; None: what a run's config may build, the user's own included.
    """
    allowed = (*ALLOWED, *allowed_by_user()) if allowed is None else allowed
    parts = target.split(".")
    entries = [entry for entry in allowed if entry.names(target)]
    if not entries or not all(part.isidentifier() for part in parts):
        names = ", ".join(entry.name for entry in allowed)
        raise ValueError(
            f"is not an allowed target; allowed: {names}; if you trust it, set {ALLOW_VARIABLE}="
            f"{parts[0]}.* in the environment"
        )
    if any(part.startswith("_") and part != "_internal" for part in parts):
        raise ValueError("is not an allowed target; names that start with _ are refused")
    entries = [entry for entry in entries if not entry.excludes(target)]
    if not entries:
        raise ValueError("is not an allowed target; it is the program's own, no part of a run")
    found = _import(parts)
    if not callable(found):
        raise ValueError(f"is a {type(found).__name__}, not a class or a function")
    module = getattr(found, "__module__", None) or ""
    houses = [entry for entry in entries if entry.houses(module)]
    if not houses:
        origin = f"{module}.{getattr(found, '__qualname__', type(found).__qualname__)}".lstrip(".")
        raise ValueError(f"is not an allowed target; it is really {origin}")
    if not inspect.isclass(found) and all(entry.classes_only for entry in houses):
        raise ValueError(f"is not an allowed target; below {houses[0].name} only classes are")
    return found


def _import(parts: list[str]) -> Any:
    """The object at a dotted name: modules as far as they go, then attributes."""
    found: Any = None
    for count, part in enumerate(parts, start=1):
        so_far = ".".join(parts[:count])
        if found is not None and hasattr(found, part):
            found = getattr(found, part)
            continue
        if found is not None and not inspect.ismodule(found):
            raise ValueError(f"cannot be imported: {'.'.join(parts[: count - 1])} has no {part!r}")
        try:
            found = importlib.import_module(so_far)
        except ImportError as error:
            if not isinstance(error, ModuleNotFoundError) or error.name != so_far:
                raise ValueError(f"cannot be imported: {error}") from error
            names = [name for name in dir(found) if not name.startswith("_")] if found else []
            names += [
                module.name for module in pkgutil.iter_modules(getattr(found, "__path__", []))
            ]
            owner = ".".join(parts[: count - 1])
            reason = f"{owner} has no {part!r}" if owner else f"no module {part!r} is installed"
            if extra := EXTRAS.get(so_far):
                raise ValueError(f"is not installed: pip install 'rlt[{extra}]'") from error
            raise ValueError(f"cannot be imported: {reason}{did_you_mean(part, names)}") from error
    return found
