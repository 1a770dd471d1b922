"""The command line as Hydra sees it: compose the config, and run its job or the jobs of its sweep.

rlt experiment=quickstart
rlt stage=teacher_rl reward=rlt check=true
rlt -m stage=teacher_rl reward=rlt,solution_only seed=0,1
"""

import os
import socket
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from rlt import __version__
from rlt.cli.launch import refuse_sweep
from rlt.cli.run import run
from rlt.config.allowed_targets import ConfigError, raise_if_any
from rlt.config.compose import (
    IN_FULL,
    USER_ERRORS,
    Loader,
    all_errors,
    explain,
    loader_for,
)
from rlt.runs.jobs import run_job

_SHOWN_CHANGES = 60


def compose_and_run() -> None:
    """Do what `sys.argv` asks for by Hydra, which is given a loader that checks what it composes.

    Raises:
        ConfigError: the config is refused.
        HydraException: the config does not compose.
        JobFailedError: jobs of a sweep have failed.
        ValueError: an option is refused.
    """
    options = get_args_parser().parse_args()
    _refuse_unchecked(options)
    loader = loader_for(options, Loader)
    app = Hydra(task_name="rlt", config_loader=loader)
    GlobalHydra.instance().initialize(app)
    try:
        _act(app, options)
    finally:
        GlobalHydra.instance().clear()


def _refuse_unchecked(options: Namespace) -> None:
    """Raises ValueError for what would not be composed, and so not be checked."""
    if options.experimental_rerun is not None:
        raise ValueError(
            "--experimental-rerun: it would unpickle a file, which can run code; go on with a run "
            "by `rlt resume <run>`, or make it again by `rlt reproduce <run>`"
        )
    if options.hydra_help and options.overrides:
        raise ValueError("--hydra-help takes no overrides: they would not be checked")


def _act(app: Hydra, options: Namespace) -> None:
    """What Hydra's own entrypoint does with its options, but errors are raised, not printed."""
    name, overrides = options.config_name or "config", list(options.overrides)
    if options.hydra_help:
        app.hydra_help(name, get_args_parser(), options)
        return
    if options.shell_completion:
        app.shell_completion(name, overrides)
        return
    mode = _mode(app, name, options)
    if sum(map(bool, (options.run, options.multirun, options.cfg, options.info))) > 1:
        raise ValueError("--run, --multirun, --cfg and --info exclude each other; give one")
    if options.cfg:
        app.show_cfg(name, overrides, options.cfg, options.package, options.resolve)
        return
    if options.info:
        app.show_info(options.info, name, overrides)
        return
    wanted = RunMode.MULTIRUN if options.multirun else mode or RunMode.RUN
    if wanted != mode:
        overrides.append(f"hydra.mode={wanted.name}")
    if wanted == RunMode.MULTIRUN:
        refuse_sweep()
    begin = app.run if wanted == RunMode.RUN else app.multirun
    begin(name, _job, overrides)


def _mode(app: Hydra, name: str, options: Namespace) -> RunMode | None:
    """Whether the config itself says that it is a sweep; if it does not compose, all errors."""
    try:
        # This mode leaves out what is swept over.
        cfg = app.compose_config(
            name, options.overrides, RunMode.MULTIRUN, validate_sweep_overrides=False
        )
        for override in OverridesParser.create().parse_overrides(options.overrides):
            if override.get_key_element() == "stage" and override.is_sweep_override():
                raise ValueError(
                    f"{override.input_line}: a sweep is of one stage; start one for each"
                )
    except HydraException as error:
        assert isinstance(app.config_loader, Loader)
        errors = all_errors(app.config_loader, options, sys.argv[1:])
        if len(errors) > 1 and not IN_FULL:
            raise_if_any(errors)
        raise error
    mode: RunMode | None = cfg.hydra.mode
    return mode


def print_error(error: Exception) -> None:
    """An error of the user's, in one line on stderr."""
    print(f"\nrlt: {explain(error, sys.argv[1:])}", file=sys.stderr)
    print("(HYDRA_FULL_ERROR=1 shows where)", file=sys.stderr)


def _job(cfg: DictConfig) -> dict[str, float]:
    """One job that Hydra composed: here, or in a process of its own if it is one of a sweep."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    # Something to see before torch is imported.
    print(f"rlt {__version__}: {'check of ' if cfg.check else ''}stage={cfg.stage}", flush=True)
    if cfg.check:
        _offline_unless_the_hub_answers()
    node = HydraConfig.get()
    multirun = node.mode == RunMode.MULTIRUN
    try:
        if cfg.check:
            return run(cfg, run_dir)
        if not multirun:
            return run(cfg, run_dir, _asked(cfg))
        return run_job(cfg, run_dir, Path(node.sweep.dir).absolute(), _asked(cfg))
    except KeyboardInterrupt:
        if multirun:
            again = f"rlt resume {Path(node.sweep.dir).absolute()}"
            print(f"\nThe sweep was interrupted. This goes on from here:  {again}", flush=True)
        raise
    except USER_ERRORS as error:  # the other jobs of a sweep go on first
        if not IN_FULL:
            print_error(error)
        if multirun or IN_FULL:
            raise
        sys.exit(2)
    finally:
        if run_dir.is_dir() and not any(run_dir.iterdir()):
            run_dir.rmdir()  # made by Hydra before anything was checked


def _asked(cfg: DictConfig) -> dict[str, Any]:
    """How Hydra was asked for this job: what its manifest is told of it."""
    asked = HydraConfig.get().overrides
    overrides = list(asked.task)
    # A launcher's own process has another command line.
    here = not overrides or any(one in sys.argv[1:] for one in overrides)
    command = sys.argv[1:] if here else [*asked.hydra, *overrides]
    return {"command": command, "overrides": overrides, **_changed(cfg)}


def _changed(cfg: DictConfig) -> dict[str, Any]:
    """What overrides made of the stage's or experiment's own config: key → [before, after].

    For the report alone.
    """
    from rlt.runs.identity import config_changes

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
        plain = loader_for(options, Loader).load_configuration(
            "config", [*search, *base], RunMode.RUN
        )
    except (HydraException, ConfigError):  # without the overrides it does not compose
        return {}
    with open_dict(plain):
        del plain["hydra"]
    changes = list(config_changes(plain, cfg).items())[:_SHOWN_CHANGES]
    return {"changed_from": " ".join(base) or "stage=pipeline", "changed": dict(changes)}


def _offline_unless_the_hub_answers() -> None:
    """Its libraries try an absent hub for minutes; a check says instead what it could not read."""
    if any(os.environ.get(name) for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy")):
        return
    hub = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((hub.hostname, hub.port or 443), timeout=2).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported
