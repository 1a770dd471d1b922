"""Hydra's composition, from the side: checked before Hydra acts on it, and its errors explained.

Hydra composes the config by itself in `rlt.cli.main`; here it is composed beforehand, with the same
search path, as Hydra acts on its own node before the program sees it.
"""

import hashlib
import os
import re
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, MutableSequence
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import (
    compute_search_path_dir,
    create_config_search_path,
    get_args_parser,
)
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import setup_globals
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from rlt import PACKAGE_DIR
from rlt.config import schema

# Errors that say what to change; their message is enough, unless HYDRA_FULL_ERROR=1.
USER_ERRORS = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    PermissionError,
    InstantiationException,
)
_MAX_FOLDER_NAME = 120  # bytes
# Whether to show stack traces. Processes that are started from here are told what the user said, as
# Hydra's variable is set for Hydra's sake. `rlt.cli.main` sets it for all processes of a command.
FULL_ERROR = "RLT_FULL_ERROR"
IN_FULL = os.environ.get(FULL_ERROR, os.environ.get("HYDRA_FULL_ERROR")) == "1"


def config_dir() -> Path:
    """The config groups: in the installed package, or beside it in a checkout."""
    inside = PACKAGE_DIR / "conf"
    return inside if inside.is_dir() else PACKAGE_DIR.parent / "conf"


def _sweep_folder(overrides: str) -> str:
    """One folder name for a job: its overrides, shortened to what a file system takes."""
    name = re.sub(r"[^\w=.,+@-]+", "_", overrides) or "job"
    short = name.encode()[:_MAX_FOLDER_NAME].decode(errors="ignore")
    if short == name and re.fullmatch(r"[\w=.,+@/-]*", overrides):  # else others may be named so
        return name
    return f"{short}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"


def _config_groups() -> str:
    """A line per group with its options, for `--help`; recipes are the stages' own."""
    lines = []
    for folder in sorted(p for p in config_dir().iterdir() if p.is_dir() and p.name != "recipe"):
        files = (p for p in folder.rglob("*.yaml") if not p.stem.startswith("_"))
        names = sorted(p.relative_to(folder).with_suffix("").as_posix() for p in files)
        group = "model@teacher, model@student" if folder.name == "model" else folder.name
        lines.append(f"{group}: {', '.join(names)}")
    return "\n".join(lines)


def register() -> None:
    # Hydra looks for plugins in the namespace package hydra_plugins alone; ours adds to it.
    sys.path.append(str(PACKAGE_DIR / "plugins"))
    schema.register()
    OmegaConf.register_new_resolver(
        "run_dir", lambda chosen, default: chosen or default, replace=True
    )
    OmegaConf.register_new_resolver("sweep_folder", _sweep_folder, replace=True)
    OmegaConf.register_new_resolver("config_groups", _config_groups, replace=True)
    setup_globals()  # Hydra's own resolvers: without them, what they give would not be checked
    ConfigLoaderImpl.load_configuration = _load_configuration  # type: ignore[method-assign]


_hydras_load_configuration = ConfigLoaderImpl.load_configuration


def _load_configuration(self: ConfigLoaderImpl, *args: Any, **kwargs: Any) -> DictConfig:
    """A config that Hydra composed, the job of a sweep among them, before it acts on it.

    Raises:
        ConfigError: it would run code, or set a variable, that is not allowed.
    """
    from rlt.config.allowed_targets import raise_if_any
    from rlt.config.hydra_guard import check_hydra_node

    cfg = _hydras_load_configuration(self, *args, **kwargs)
    # In the processes of a command alone, not where somebody composes configs of their own.
    checked = FULL_ERROR in os.environ and not isinstance(self, _Loader)
    if checked and cfg.hydra.job.config_name is not None:
        raise_if_any(check_hydra_node(cfg.hydra))
    return cfg


register()


def check_before_hydra_acts(arguments: list[str]) -> None:
    """Compose the config once more, to check the node `hydra` before Hydra itself acts on it.

    Raises:
        HydraException: it does not compose.
        ValueError: it would run code, or set a variable, that is not allowed.
    """
    from rlt.config.allowed_targets import raise_if_any
    from rlt.config.hydra_guard import check_hydra_node

    options = get_args_parser().parse_args(arguments)
    if options.experimental_rerun is not None:
        raise ValueError(
            "--experimental-rerun: it would unpickle a file, which can run code; go on with a run "
            "by resume=<folder>, or make it again by reproduce=<folder>"
        )
    check_search_path([options.config_path or ""])
    if options.hydra_help and options.overrides:
        raise ValueError("--hydra-help takes no overrides: they would not be checked")
    if options.hydra_help or options.shell_completion:
        return
    name, loader = options.config_name or "config", loader_for(options)
    mode = RunMode.MULTIRUN  # leaves out what is swept over
    try:
        cfg = loader.load_configuration(
            name, options.overrides, mode, validate_sweep_overrides=False
        )
        for override in OverridesParser.create().parse_overrides(options.overrides):
            if override.get_key_element() == "stage" and override.is_sweep_override():
                raise ValueError(
                    f"{override.input_line}: a sweep is of one stage; start one for each"
                )
    except HydraException as error:
        errors = _all_errors(loader, name, options.overrides, arguments)
        if len(errors) > 1 and not IN_FULL:
            raise_if_any(errors)
        raise error
    raise_if_any(check_hydra_node(cfg.hydra))


def _all_errors(
    loader: ConfigLoaderImpl, name: str, overrides: list[str], arguments: list[str]
) -> list[str]:
    """Everything that is wrong with overrides that do not compose, and with what is left."""
    from rlt.config.check import check_schema_keys, check_targets
    from rlt.config.hydra_guard import check_hydra_node
    from rlt.config.override_errors import composition_errors

    refused, cfg = composition_errors(loader, name, overrides)
    errors = [explain(error, arguments) for error in refused]
    if cfg is None:
        return errors
    errors += check_hydra_node(cfg.hydra)
    with open_dict(cfg):
        del cfg["hydra"]
    return errors + check_schema_keys(cfg, schema.of(cfg.stage)) + check_targets(cfg)


def loader_for(options: Namespace) -> ConfigLoaderImpl:
    """Hydra's loader over the folders that it will itself look into."""
    folder = compute_search_path_dir(__file__, None, options.config_path or str(config_dir()))
    search_path = create_config_search_path(folder)
    if options.config_dir is not None:
        search_path.prepend(
            provider="command-line",
            path=f"file://{Path(options.config_dir).absolute()}",
            anchor=SearchPathQuery(provider="schema"),
        )
    return _Loader(search_path)


class _Loader(ConfigLoaderImpl):
    """Hydra's loader, which imports a package that it is to search: only if that is allowed."""

    def _process_config_searchpath(
        self, config_name: str | None, parsed_overrides: list[Override], repo: Any
    ) -> None:
        primary = repo.load_config(config_path=config_name) if config_name else None
        given = [o.value() for o in parsed_overrides if o.key_or_group == "hydra.searchpath"]
        if primary is not None and OmegaConf.is_dict(primary.config):
            given.append(OmegaConf.select(primary.config, "hydra.searchpath"))
        for paths in given:  # what is no list, Hydra refuses
            check_search_path(paths if isinstance(paths, MutableSequence) else [])
        super()._process_config_searchpath(config_name, parsed_overrides, repo)


def check_search_path(paths: Iterable[object]) -> None:
    """Raises ValueError for a folder of configs that would be found by importing a package."""
    from rlt.config.allowed_targets import ALLOW_VARIABLE, allowed_by_user

    for path in map(str, paths):
        scheme, separator, place = path.partition("://")
        package = place.replace("/", ".").rstrip(".")
        trusted = [e for e in allowed_by_user() if e.names(package) or e.name == f"{package}.*"]
        if separator and scheme not in ("file", "structured") and not trusted:
            raise ValueError(
                f"{path}: configs are not searched for in a package, as that would be imported; "
                f"give the folder, file:///path/to/configs, or set {ALLOW_VARIABLE}={package}.* in "
                "the environment if you trust the package"
            )


def explain(error: Exception, arguments: list[str]) -> str:
    """What is wrong, with the names that were perhaps meant."""
    from rlt.config.suggestions import explain_struct_error

    if isinstance(error, InstantiationException):  # a nested node refused its values
        where = str(error).partition("full_key: ")[2]
        return f"{where}: {error.__cause__ or error}" if where else str(error)
    if isinstance(error, OSError) and error.filename:
        where = "; choose another output_dir" if isinstance(error, FileExistsError) else ""
        return f"{error.filename}: {error.strerror}{where}"
    if not isinstance(error, HydraException):
        return f"{type(error).__name__}: {error}"
    return explain_struct_error(error, groups=_groups(arguments))


def _groups(arguments: list[str]) -> Iterator[str]:
    """What stands left of = to choose an option: `reward`, `model@teacher`, …; found if asked for.

    They depend on the stage, and on the experiment, unless that is what does not compose.
    """
    options = get_args_parser().parse_args(arguments)
    chosen = [
        override
        for key in ("hydra.searchpath", "stage", "experiment")
        for override in options.overrides
        if override.partition("=")[0] == key
    ]
    groups = {"stage", "experiment", "sweep", "debug"}
    while True:
        try:
            found = loader_for(options).compute_defaults_list("config", chosen, RunMode.MULTIRUN)
            break
        except HydraException:
            if not chosen:
                yield from sorted(groups)
                return
            chosen.pop()
    for default in found.defaults:
        group = (default.config_path or "").rpartition("/")[0]
        mounted_by = (default.parent or "").partition("/")[0]
        if mounted_by in ("stage", "recipe") and group not in ("schema", "recipe"):
            package = default.package or ""
            groups.add(group if package in ("", group) else f"{group}@{package}")
    yield from sorted(groups)
