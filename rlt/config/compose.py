"""Hydra's composition: the folders it reads, the check of what it composes, its errors explained.

Hydra is given `Loader` by `rlt.cli.hydra_app`, so whatever it composes (a run, every job of a
sweep, in the processes of a launcher too) is checked before Hydra acts on it.
"""

import hashlib
import os
import re
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, MutableSequence
from pathlib import Path
from typing import Any, TypeVar

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import (
    compute_search_path_dir,
    create_config_search_path,
    get_args_parser,
)
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.override_parser.types import Override
from hydra.core.utils import setup_globals
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from rlt import PACKAGE_DIR

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
IN_FULL = os.environ.get("HYDRA_FULL_ERROR") == "1"  # whether stack traces are shown


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
    """Register rlt's plugins with Hydra and rlt's resolvers with OmegaConf."""
    # Hydra looks for plugins in the namespace package hydra_plugins alone; ours adds to it.
    sys.path.append(str(PACKAGE_DIR / "plugins"))
    OmegaConf.register_new_resolver(
        "run_dir", lambda chosen, default: chosen or default, replace=True
    )
    OmegaConf.register_new_resolver("sweep_folder", _sweep_folder, replace=True)
    OmegaConf.register_new_resolver("config_groups", _config_groups, replace=True)
    setup_globals()  # Hydra's own resolvers: without them, what they give would not be checked
    version.setbase("1.3")


register()


class Loader(ConfigLoaderImpl):
    """Hydra's loader, which refuses configs by which Hydra would run what is not allowed."""

    def load_configuration(
        self, config_name: str | None, overrides: list[str], *args: Any, **kwargs: Any
    ) -> DictConfig:
        """A composed config, whose node `hydra` has been checked.

        Raises:
            ConfigError: by that node Hydra would run code, or set a variable, that is not allowed.
            HydraException: the config does not compose.
        """
        from rlt.config.allowed_targets import raise_if_any
        from rlt.config.hydra_guard import check_hydra_node

        cfg = super().load_configuration(config_name, overrides, *args, **kwargs)
        if config_name is not None:  # None is Hydra's own config alone, for --hydra-help
            raise_if_any(check_hydra_node(cfg.hydra))
        return cfg

    def _process_config_searchpath(
        self, config_name: str | None, parsed_overrides: list[Override], repo: Any
    ) -> None:
        # Hydra would import a package that it is to search.
        primary = repo.load_config(config_path=config_name) if config_name else None
        given = [o.value() for o in parsed_overrides if o.key_or_group == "hydra.searchpath"]
        if primary is not None and OmegaConf.is_dict(primary.config):
            given.append(OmegaConf.select(primary.config, "hydra.searchpath"))
        for paths in given:  # what is no list, Hydra refuses
            check_search_path(paths if isinstance(paths, MutableSequence) else [])
        super()._process_config_searchpath(config_name, parsed_overrides, repo)


LoaderKind = TypeVar("LoaderKind", bound=Loader)


def loader_for(options: Namespace, kind: type[LoaderKind]) -> LoaderKind:
    """A loader over the folders that the command line names, and those of this project.

    Raises:
        ValueError: a folder of configs would be found by importing a package.
    """
    check_search_path([options.config_path or ""])
    folder = compute_search_path_dir(__file__, None, options.config_path or str(config_dir()))
    search_path = create_config_search_path(folder)
    if options.config_dir is not None:
        if not Path(options.config_dir).is_dir():
            raise FileNotFoundError(f"--config-dir={options.config_dir}: no such folder")
        search_path.prepend(
            provider="command-line",
            path=f"file://{Path(options.config_dir).absolute()}",
            anchor=SearchPathQuery(provider="schema"),
        )
    return kind(search_path)


def all_errors(loader: ConfigLoaderImpl, options: Namespace, arguments: list[str]) -> list[str]:
    """Everything that is wrong with overrides that do not compose, and with what is left."""
    from rlt.config.check import check_targets
    from rlt.config.hydra_guard import check_hydra_node
    from rlt.config.override_errors import composition_errors

    name = options.config_name or "config"
    refused, cfg = composition_errors(loader, name, options.overrides)
    errors = [explain(error, arguments) for error in refused]
    if cfg is None:
        return errors
    errors += check_hydra_node(cfg.hydra)
    with open_dict(cfg):
        del cfg["hydra"]
    return errors + check_targets(cfg)


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
            found = loader_for(options, Loader).compute_defaults_list(
                "config", chosen, RunMode.MULTIRUN
            )
            break
        except HydraException:
            if not chosen:
                yield from sorted(groups)
                return
            chosen.pop()
    for default in found.defaults:
        group = (default.config_path or "").rpartition("/")[0]
        mounted_by = (default.parent or "").partition("/")[0]
        if mounted_by in ("stage", "recipe") and group != "recipe":
            package = default.package or ""
            groups.add(group if package in ("", group) else f"{group}@{package}")
    yield from sorted(groups)
