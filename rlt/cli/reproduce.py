"""`rlt reproduce <run>`: make a run again from its folder, and tell whether the results are equal.

The run is made in a fresh process, in a folder of its own. Of what decides its numbers, the config
and the number of torch threads are the original's; what else has changed since is told beforehand.
"""

import contextlib
import sys
import tempfile
from collections.abc import Collection, Iterator
from itertools import count
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from rlt.config.saved import load_config
from rlt.report.difference import metadata_changes, print_comparison, require_run
from rlt.report.equality import Changes, compare_results, pipeline_steps
from rlt.report.folder import Run
from rlt.runs.environment import environment
from rlt.runs.identity import config_key
from rlt.runs.jobs import run_config
from rlt.stages.steps import code_digest, input_fingerprints


def reproduce(folder: Path) -> int:
    """Make a finished run again from its folder alone, in `<folder>-reproduced`, and compare.

    Returns:
        0 if all results are equal bit for bit, 1 if some differ; the exit status of the new run,
        which has said why, if that failed.

    Raises:
        FileNotFoundError: the folder, or what the run read, is not there.
        ValueError: the folder holds no finished run, or its config is refused.
    """
    folder = folder.absolute()
    run = require_run(folder)
    status = run.manifest.get("status")
    if status != "finished":
        raise ValueError(
            f"{folder}: the run is {status}, not finished, and has no results to compare with; "
            f"finish it first: rlt resume {folder}"
        )
    names = (f"{folder.name}-reproduced{f'-{n}' if n > 1 else ''}" for n in count(1))
    into = next(path for path in map(folder.with_name, names) if not path.exists())
    # Resolved, a pipeline's config would not follow what its steps set.
    cfg = load_config(folder / ("composed.yaml" if pipeline_steps(folder) else "config.yaml"))
    cwd = Path(run.manifest.get("cwd") or "")  # what relative paths in the config are relative to
    with contextlib.chdir(cwd if cwd.is_dir() else Path.cwd()):
        changed = list(_changed_since(run, cfg))
        print(f"reproducing {folder}\n         in {into}", flush=True)
        for line in changed:
            print(f"changed since: {line}", flush=True)
        ended = _run(cfg, into, run.manifest.get("hardware", {}).get("torch_threads"))
    if ended != 0:
        print(f"not reproduced: the run in {into} ended with exit status {ended}", file=sys.stderr)
        return max(ended, 2)  # 1 is a result
    results = compare_results(folder, into)
    print_comparison(Console(), results, ("original", "reproduced"))
    return int(bool(results.differences))


def _changed_since(run: Run, cfg: DictConfig) -> Iterator[str]:
    """Lines on code, packages, machine, inputs and config that are not what they were.

    Raises:
        FileNotFoundError: what the run read is not there.
        ValueError: it cannot be read.
    """
    then, steps = run.manifest, pipeline_steps(run.folder)
    now = {**environment(), "code": code_digest()}
    if (threads := then.get("hardware", {}).get("torch_threads")) is not None:
        now["hardware"] |= {"torch_threads": threads}
    if "code" not in then:
        del now["code"]
    lines = _lines(metadata_changes({k: v for k, v in then.items() if k != "inputs"}, now))
    for name, (folder, needs) in steps.items():
        lines += [f"step {name}, {line}" for line in _changed_inputs(folder, needs)]
    if not steps:
        lines += _changed_inputs(run.folder)
    yield from lines
    # A step of a pipeline lies in a folder named by its key, which is made of more than the config.
    if not lines and run.folder.name != then["key"]:
        key = config_key(cfg, {} if steps else input_fingerprints(cfg))
        if key != then["key"]:
            yield f"config.yaml: its key was {then['key']}, now {key}"
    if "went_on_with" in then:
        yield "config.yaml: values were changed on the way (manifest.json: went_on_with)"


def _changed_inputs(folder: Path, needs: Collection[str] = ()) -> list[str]:
    """The same of what a run read, but for what an earlier step makes again."""
    inputs = Run(folder).manifest.get("inputs")
    if inputs is None:
        return ["perhaps inputs: the manifest holds no fingerprints of them"]
    now = input_fingerprints(load_config(folder / "config.yaml"), needs)
    known = {key: value for key, value in inputs.items() if key not in needs}
    return _lines(metadata_changes({"inputs": known}, {"inputs": now}))


def _lines(changes: Changes) -> list[str]:
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
