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
from typing import Any, cast
from urllib.parse import urlsplit

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from rlt import __version__
from rlt.cli.run import run
from rlt.config.compose import (
    IN_FULL,
    USER_ERRORS,
    Loader,
    check_before_hydra_acts,
    config_dir,
    explain,
    loader_for,
)
from rlt.runs.jobs import run_job

_SHOWN_CHANGES = 60


def compose_and_run() -> None:
    """What `sys.argv` asks for, by Hydra."""
    check_before_hydra_acts(sys.argv[1:])
    _composed_job()


def print_error(error: Exception) -> None:
    """An error of the user's, in one line on stderr."""
    print(f"\nrlt: {explain(error, sys.argv[1:])}", file=sys.stderr)
    print("(HYDRA_FULL_ERROR=1 shows where)", file=sys.stderr)


def _job(cfg: DictConfig) -> dict[str, float]:
    """One job that Hydra composed: here, or in a process of its own if it is one of a sweep."""
    from rlt.config.allowed_targets import raise_if_any
    from rlt.config.hydra_guard import check_hydra_node

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


# The undecorated function keeps its name, by which launchers send it to other processes.
_composed_job = hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")(
    _job
)


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
    except HydraException:  # without the overrides it does not compose
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
