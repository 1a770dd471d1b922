"""`rlt reproduce <run>`: make a run again from its folder, and tell whether the results are equal.

The run is made in a fresh process, in a folder of its own. Of what decides its numbers, the config
and the number of torch threads are the original's; what else has changed since is told beforehand.
"""

import contextlib
import sys
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from rlt.config.saved import load_config
from rlt.report.difference import metadata_changes, print_comparison, require_run
from rlt.report.equality import compare_results, pipeline_steps
from rlt.report.folder import Run
from rlt.runs.environment import environment
from rlt.runs.identity import config_key
from rlt.runs.jobs import run_config
from rlt.stages.projection import code_digest, input_fingerprints


def reproduce(folder: Path, into: Path | None = None) -> int:
    """Make a finished run again from its folder alone, and compare the results.

    Args:
        into: the new run's folder; `<folder>-reproduced` if None, or with -2, -3 … behind it.

    Returns:
        0 if all results are equal bit for bit, 1 if some differ; the exit status of the new run,
        which has said why, if that failed.

    Raises:
        FileNotFoundError: the folder, or what the run read, is not there.
        ValueError: the folder holds no finished run, its config is refused, or `into` is taken.
    """
    folder = folder.absolute()
    run = require_run(folder)
    status = run.manifest.get("status")
    if status != "finished":
        raise ValueError(
            f"{folder}: the run is {status}, not finished, and has no results to compare with; "
            "finish it first, with the command in its manifest.json"
        )
    into = _new_folder(folder, into)
    threads = run.manifest.get("hardware", {}).get("torch_threads")
    # Resolved, a pipeline's config would not follow what its steps set.
    cfg = load_config(folder / ("composed.yaml" if pipeline_steps(folder) else "config.yaml"))
    with contextlib.chdir(_cwd(run)):
        lines = _changed_since(folder, cfg, threads)
        print(f"reproducing {folder}\n         in {into}", flush=True)
        for line in lines:
            print(f"changed since: {line}", flush=True)
        ended = _run(cfg, into, threads)
    if ended != 0:
        print(f"not reproduced: the run in {into} ended with exit status {ended}", file=sys.stderr)
        return max(ended, 2)  # 1 is a result
    results = compare_results(folder, into)
    print_comparison(Console(), results, ("original", "reproduced"))
    return int(bool(results.differences))


def _new_folder(folder: Path, into: Path | None) -> Path:
    """The folder asked for, or the first free one beside the original."""
    if into is None:
        number, into = 1, folder.with_name(f"{folder.name}-reproduced")
        while into.exists():
            number += 1
            into = folder.with_name(f"{folder.name}-reproduced-{number}")
    elif into.exists() and not (into.is_dir() and not any(into.iterdir())):
        raise ValueError(f"{into} is not empty: a reproduction needs a folder of its own")
    return into.absolute()


def _cwd(run: Run) -> Path:
    """What relative paths in the config are relative to."""
    recorded = Path(run.manifest.get("cwd") or "")
    return recorded if recorded.is_dir() else Path.cwd()


def _changed_since(folder: Path, cfg: DictConfig, threads: int | None) -> list[str]:
    """Lines on code, packages, machine, inputs and config that are not what they were.

    Raises:
        FileNotFoundError: what the run read is not there.
        ValueError: it cannot be read.
    """
    then = Run(folder).manifest
    now = {**environment(), "code": code_digest()}
    if threads is not None:
        now["hardware"] |= {"torch_threads": threads}
    if "code" not in then:
        del now["code"]
    lines = _lines({k: v for k, v in then.items() if k != "inputs"}, now)
    steps = pipeline_steps(folder)
    for name, step in steps.items():
        lines += [f"step {name}, {line}" for line in _changed_inputs(step.folder, step.inputs)]
    if not steps:
        lines += _changed_inputs(folder)
    # A step of a pipeline lies in a folder named by its key, which is made of more than the config.
    if not lines and folder.name != then["key"]:
        key = config_key(cfg, {} if steps else input_fingerprints(cfg))
        if key != then["key"]:
            lines = [f"config.yaml: its key was {then['key']}, now {key}"]
    if "went_on_with" in then:
        lines.append("config.yaml: values were changed on the way (manifest.json: went_on_with)")
    return lines


def _changed_inputs(folder: Path, needs: Collection[str] = ()) -> list[str]:
    """The same of what a run read, but for what an earlier step makes again."""
    inputs = Run(folder).manifest.get("inputs")
    if inputs is None:
        return ["perhaps inputs: the manifest holds no fingerprints of them"]
    now = input_fingerprints(load_config(folder / "config.yaml"), needs)
    known = {key: value for key, value in inputs.items() if key not in needs}
    return _lines({"inputs": known}, {"inputs": now})


def _lines(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    changes = metadata_changes(then, now)
    return [f"{fact}: was {old}, now {new}" for fact, (old, new) in changes.items()]


def _run(cfg: DictConfig, into: Path, threads: int | None) -> int:
    """Run a config in a folder, in a process of its own; returns its exit status."""
    cfg = cfg.copy()
    cfg.output_dir = str(into)
    if "cache_dir" in cfg:
        cfg.cache_dir = str(into / "store")  # no step is taken from the original's
    # Sums depend on the number of threads, which a config need not name.
    threaded = {} if threads is None else {"OMP_NUM_THREADS": str(threads), "MKL_DYNAMIC": "FALSE"}
    with tempfile.TemporaryDirectory(prefix="rlt-job-") as temporary:
        config = Path(temporary) / "config.yaml"
        OmegaConf.save(cfg, config)
        status = run_config(config, into, threaded)
    return status if status >= 0 else 128 - status
