"""The entrypoint: compose, check, seed, run the stage, return its metrics.

rlt experiment=quickstart
rlt stage=teacher_rl reward=rlt check=true
rlt -m stage=teacher_rl reward=rlt,solution_only seed=0,1
"""

import hashlib
import os
import re
import socket
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import (
    compute_search_path_dir,
    create_config_search_path,
    get_args_parser,
)
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from rlt import __version__, schema
from rlt.signals import exit_status, terminable
from rlt.sweeps import JobFailed, failures, run_job
from rlt.verbs import verb_of

# Errors that say what to change; their message is enough, unless HYDRA_FULL_ERROR=1.
USER_ERRORS = (ValueError, FileNotFoundError, InstantiationException)
_MAX_FOLDER_NAME = 120
_SHOWN_CHANGES = 60
# Whether to show stack traces. Processes that are started from here are told what the user said, as
# Hydra's variable is set for Hydra's sake.
_FULL_ERROR = "RLT_FULL_ERROR"
IN_FULL = os.environ.get(_FULL_ERROR, os.environ.get("HYDRA_FULL_ERROR")) == "1"
_PARTIAL_FAILURE = 1  # exit status of a sweep of which jobs have failed


def config_dir() -> Path:
    """The config groups: in the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "conf"


def _sweep_folder(overrides: str) -> str:
    """One folder name for a job: its overrides, shortened to what a file system takes."""
    name = re.sub(r"[^\w=.,+@-]+", "_", overrides)
    if len(name) <= _MAX_FOLDER_NAME:
        return name
    return f"{name[:_MAX_FOLDER_NAME]}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"


def _config_groups() -> str:
    """A line per group with its options, for `--help`; recipes are the stages' own."""
    lines = []
    for folder in sorted(p for p in config_dir().iterdir() if p.is_dir() and p.name != "recipe"):
        names = sorted(p.stem for p in folder.glob("*.yaml") if not p.stem.startswith("_"))
        group = "model@teacher, model@student" if folder.name == "model" else folder.name
        lines.append(f"{group}: {', '.join(names)}")
    return "\n".join(lines)


def _register() -> None:
    # Hydra looks for plugins in the namespace package hydra_plugins alone; ours adds to it.
    sys.path.append(str(Path(__file__).parent / "plugins"))
    schema.register()
    OmegaConf.register_new_resolver(
        "run_dir", lambda chosen, default: chosen or default, replace=True
    )
    OmegaConf.register_new_resolver("sweep_folder", _sweep_folder, replace=True)
    OmegaConf.register_new_resolver("config_groups", _config_groups, replace=True)


_register()


def run(cfg: DictConfig, run_dir: Path, facts: dict[str, Any] | None = None) -> dict[str, float]:
    """Check a composed config, then run its stage (or, with `check=true`, print its plan).

    Args:
        facts: how the run was asked for, for its manifest.
    """
    from rlt.checks import check_schema_keys, check_targets, raise_if_any

    raise_if_any(check_schema_keys(cfg, schema.STAGES[cfg.stage]) + check_targets(cfg))
    from rlt.quiet import quiet
    from rlt.stages import run_stage
    from rlt.stages.plan import print_plan

    quiet()

    if cfg.check:
        print_plan(cfg, run_dir)
        return {}
    return run_stage(cfg, run_dir, facts=facts)


def _asked(cfg: DictConfig) -> dict[str, Any]:
    """How Hydra was asked for this job: what its manifest is told of it."""
    asked = HydraConfig.get().overrides
    multirun = HydraConfig.get().mode == RunMode.MULTIRUN
    overrides = list(asked.task)
    command = [*asked.hydra, *overrides] if multirun else sys.argv[1:]
    return {"command": command, "overrides": overrides, **_changed(cfg)}


def _changed(cfg: DictConfig) -> dict[str, Any]:
    """What overrides made of the stage's or experiment's own config: key → [before, after].

    For the report alone.
    """
    from rlt.runtime import config_changes

    overrides = list(HydraConfig.get().overrides.task)
    base = [o for o in overrides if o.partition("=")[0] in ("stage", "experiment")]
    chosen = HydraConfig.get().runtime.choices
    if chosen.get("sweep"):  # it may have chosen the experiment
        base = [f"experiment={chosen['experiment']}"] if chosen.get("experiment") else base
    if len(base) == len(overrides):
        return {}
    sources = {source.provider: source for source in HydraConfig.get().runtime.config_sources}
    given = sources.get("command-line")
    options = Namespace(config_path=None, config_dir=given.path if given else None)
    search = [
        f"hydra.searchpath=[{source.schema}://{source.path}]"
        for provider, source in sources.items()
        if provider.startswith("hydra.searchpath")
    ]
    try:
        plain = _loader(options).load_configuration("config", [*search, *base], RunMode.RUN)
    except HydraException:  # without the overrides it does not compose
        return {}
    with open_dict(plain):
        del plain["hydra"]
    changes = list(config_changes(plain, cfg).items())[:_SHOWN_CHANGES]
    return {"changed_from": " ".join(base) or "stage=pipeline", "changed": dict(changes)}


def _task(cfg: DictConfig) -> dict[str, float]:
    from rlt.checks import check_hydra_node, raise_if_any

    run_dir = Path(HydraConfig.get().runtime.output_dir)
    # Something to see before torch is imported.
    print(f"rlt {__version__}: {'check of ' if cfg.check else ''}stage={cfg.stage}", flush=True)
    if cfg.check:
        _offline_unless_the_hub_answers()
    node = HydraConfig.get()
    multirun = node.mode == RunMode.MULTIRUN
    try:
        raise_if_any(check_hydra_node(cast(DictConfig, node)))  # may be another for each job
        if cfg.check:
            return run(cfg, run_dir)
        if not multirun:
            return run(cfg, run_dir, _asked(cfg))
        return run_job(cfg, run_dir, Path(node.sweep.dir).absolute(), _asked(cfg))
    except KeyboardInterrupt:
        if multirun:
            again = f"rlt resume={Path(node.sweep.dir).absolute()}"
            print(f"\nThe sweep was interrupted. This goes on from here:  {again}", flush=True)
        raise
    except USER_ERRORS as error:  # the other jobs of a sweep go on first
        if not IN_FULL:
            _print(error)
        if multirun or IN_FULL:
            raise
        sys.exit(2)
    finally:
        if run_dir.is_dir() and not any(run_dir.iterdir()):
            run_dir.rmdir()  # made by Hydra before anything was checked


# The undecorated function keeps its name, by which launchers send it to other processes.
_composed_task = hydra.main(
    version_base="1.3", config_path=str(config_dir()), config_name="config"
)(_task)


def _offline_unless_the_hub_answers() -> None:
    """Its libraries try an absent hub for minutes; a check says instead what it could not read."""
    if any(os.environ.get(name) for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy")):
        return
    hub = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((hub.hostname, hub.port or 443), timeout=2).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported


def main() -> None:
    """The console script: `_task`, with errors in one line instead of Hydra's or a stack trace."""
    # Hydra then raises errors instead of printing them.
    given = {"HYDRA_FULL_ERROR": "1", _FULL_ERROR: str(int(IN_FULL))}
    before = {name: os.environ.get(name) for name in given}
    os.environ |= given
    try:
        options = get_args_parser().parse_args()
        if (
            options.help or len(sys.argv) == 1
        ):  # Hydra would copy every group again to list each, which takes seconds
            print(OmegaConf.load(config_dir() / "config.yaml").hydra.help.template)
            return
        with terminable():
            if (verb := verb_of(sys.argv[1:])) is not None:
                sys.exit(verb())
            compose_and_run()
    except KeyboardInterrupt as stop:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(exit_status(stop))
    except JobFailed as error:
        print(f"\nrlt: {failures(Path(error.args[2]))}", file=sys.stderr)
        sys.exit(_PARTIAL_FAILURE)
    except (*USER_ERRORS, HydraException) as error:
        if IN_FULL:
            raise
        _print(error)
        sys.exit(2)
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


def compose_and_run() -> None:
    """What the command line asks for, by Hydra."""
    _check_before_hydra_acts(sys.argv[1:])
    _composed_task()


def _print(error: Exception) -> None:
    print(f"\nrlt: {explain(error, sys.argv[1:])}", file=sys.stderr)
    print("(HYDRA_FULL_ERROR=1 shows where)", file=sys.stderr)


def _check_before_hydra_acts(arguments: list[str]) -> None:
    """Compose the config once more, to check the node `hydra` before Hydra itself acts on it.

    Raises:
        HydraException: it does not compose.
        ValueError: it would run code, or set a variable, that is not allowed.
    """
    from rlt.checks import check_hydra_node, raise_if_any

    options = get_args_parser().parse_args(arguments)
    if options.hydra_help or options.shell_completion:
        return
    name, loader = options.config_name or "config", _loader(options)
    mode = RunMode.MULTIRUN  # leaves out what is swept over
    try:
        cfg = loader.load_configuration(
            name, options.overrides, mode, validate_sweep_overrides=False
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
    from rlt.checks import check_hydra_node, check_schema_keys, check_targets
    from rlt.overrides import composition_errors

    refused, cfg = composition_errors(loader, name, overrides)
    errors = [explain(error, arguments) for error in refused]
    if cfg is None:
        return errors
    errors += check_hydra_node(cfg.hydra)
    with open_dict(cfg):
        del cfg["hydra"]
    return errors + check_schema_keys(cfg, schema.STAGES[cfg.stage]) + check_targets(cfg)


def _loader(options: Namespace) -> ConfigLoaderImpl:
    """Hydra's loader over the folders that it will itself look into."""
    folder = compute_search_path_dir(__file__, None, options.config_path or str(config_dir()))
    search_path = create_config_search_path(folder)
    if options.config_dir is not None:
        search_path.prepend(
            provider="command-line",
            path=f"file://{Path(options.config_dir).absolute()}",
            anchor=SearchPathQuery(provider="schema"),
        )
    return ConfigLoaderImpl(search_path)


def explain(error: Exception, arguments: list[str]) -> str:
    """What is wrong, with the names that were perhaps meant."""
    from rlt.names import explain_struct_error

    if isinstance(error, InstantiationException):  # a nested node refused its values
        where = str(error).partition("full_key: ")[2]
        return f"{where}: {error.__cause__ or error}" if where else str(error)
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
            found = _loader(options).compute_defaults_list("config", chosen, RunMode.MULTIRUN)
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


if __name__ == "__main__":
    main()
