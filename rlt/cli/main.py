"""The entrypoint: compose, check, seed, run the stage, return its metrics.

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
from hydra._internal.utils import (
    get_args_parser,
)
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from rlt import __version__
from rlt.cli.run_commands import verb_of
from rlt.config.compose import (
    FULL_ERROR,
    IN_FULL,
    USER_ERRORS,
    check_before_hydra_acts,
    config_dir,
    explain,
    loader_for,
)
from rlt.runs.jobs import JobFailedError, failures, read_jobs, run_job
from rlt.runs.signals import exit_status, terminable

_SHOWN_CHANGES = 60
_PARTIAL_FAILURE = 1  # exit status of a sweep of which jobs have failed


def run(cfg: DictConfig, run_dir: Path, metadata: dict[str, Any] | None = None) -> dict[str, float]:
    """Check a composed config, then run its stage (or, with `check=true`, print its plan).

    Args:
        metadata: how the run was asked for, for its manifest.
    """
    from rlt.cli.quiet_libraries import quiet
    from rlt.config.build import build_stage
    from rlt.preflight.plan import print_plan
    from rlt.stages.run import run_stage

    stage = build_stage(cfg)
    quiet()
    if cfg.check:
        print_plan(cfg, stage, run_dir)
        return {}
    return run_stage(cfg, run_dir, metadata=metadata, stage=stage)


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
        plain = loader_for(options).load_configuration("config", [*search, *base], RunMode.RUN)
    except HydraException:  # without the overrides it does not compose
        return {}
    with open_dict(plain):
        del plain["hydra"]
    changes = list(config_changes(plain, cfg).items())[:_SHOWN_CHANGES]
    return {"changed_from": " ".join(base) or "stage=pipeline", "changed": dict(changes)}


def _task(cfg: DictConfig) -> dict[str, float]:
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
    given = {"HYDRA_FULL_ERROR": "1", FULL_ERROR: str(int(IN_FULL))}
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
    except JobFailedError as error:
        folder = Path(error.args[2])
        told = any(job["status"] == "failed" for job in read_jobs(folder))
        print(f"\nrlt: {failures(folder) if told else error}", file=sys.stderr)
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
    check_before_hydra_acts(sys.argv[1:])
    _composed_task()


def _print(error: Exception) -> None:
    print(f"\nrlt: {explain(error, sys.argv[1:])}", file=sys.stderr)
    print("(HYDRA_FULL_ERROR=1 shows where)", file=sys.stderr)


if __name__ == "__main__":
    main()
