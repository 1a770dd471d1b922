"""Overrides that do not fit the config, all of them: Hydra stops at the first."""

from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

_MOST_ERRORS = 10
_DECIDE = ("stage", "experiment", "sweep", "debug")  # what other overrides mean hangs on these


def composition_errors(
    loader: ConfigLoaderImpl, name: str, overrides: list[str]
) -> tuple[list[HydraException], DictConfig | None]:
    """What Hydra says of each override that it does not take, and the config without them.

    Args:
        name: of the root config.

    Returns:
        At most ten errors; None for a config where the rest does not compose either, or means
        something else without the override that failed.
    """
    errors: list[HydraException] = []
    rest = list(overrides)
    while True:
        try:
            found = loader.compute_defaults_list(name, rest, RunMode.MULTIRUN)
            break
        except HydraException as error:
            errors.append(error)
            blamed = _blamed(loader, name, rest, error)
            if blamed is None or _key(blamed) in _DECIDE or len(errors) == _MOST_ERRORS:
                return errors, None
            # Values below a part that was not chosen would be errors of its absence.
            below = (_key(blamed).rpartition("@")[2] or _key(blamed)) + "."
            rest = [o for o in rest if o != blamed and not _key(o).startswith(below)]
    values = found.config_overrides
    lines = {override.input_line for override in values}
    choices = [override for override in rest if override not in lines]
    try:
        # Not by the loader's own method, which raises what is wrong with the node `hydra`.
        cfg = ConfigLoaderImpl.load_configuration(
            loader, name, choices, RunMode.MULTIRUN, validate_sweep_overrides=False
        )
    except HydraException as error:  # a file is at fault
        return [*errors, error], None
    for override in values:
        try:
            ConfigLoaderImpl._apply_overrides_to_config([override], cfg)
        except HydraException as error:
            errors.append(error)
    return errors[:_MOST_ERRORS], cfg


def _blamed(
    loader: ConfigLoaderImpl, name: str, overrides: list[str], error: HydraException
) -> str | None:
    """The override without which this error is gone: those that it mentions are tried first.

    Last are those that change any error, as other files are then composed.
    """
    text = str(error)

    def order(override: str) -> tuple[bool, bool]:
        value = override.partition("=")[2]
        return _key(override) in _DECIDE, _key(override) not in text and value not in text

    for override in sorted(overrides, key=order):
        rest: list[Any] = [other for other in overrides if other != override]
        try:
            loader.compute_defaults_list(name, rest, RunMode.MULTIRUN)
        except HydraException as other_error:
            if str(other_error) == text:
                continue
        return override
    return None


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")
