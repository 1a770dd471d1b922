"""Stages: each reads and writes plain artefacts in a run folder of its own.

A stage is a module with `run(cfg, run)`, given its config and its claimed run folder, returning
its final metrics.
"""

import importlib
import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from rlt.runtime import RunFolder, config_key
from rlt.stages.projection import code_digest, input_fingerprints
from rlt.stages.values import check_values, require_device

log = logging.getLogger(__name__)

_INTERRUPTED = 130  # exit status of a program that Ctrl-C ended
_TERMINATED = 143  # of one that SIGTERM ended


def run_stage(
    cfg: DictConfig,
    run_dir: Path,
    key: str | None = None,
    changed: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Run one stage in its folder: from the start, from where it stopped, or not again.

    Args:
        key: identity of the run's config and inputs, if it is a step of a pipeline; made from the
            config if None.
        changed: what its overrides changed, for the report.
    """
    import lightning as L
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from rlt.hardware import prepare
    from rlt.report import print_result, write_result

    if "hardware" in cfg:
        require_device(cfg)
        prepare(cfg)
    inputs: dict[str, str] = {}  # of a pipeline its steps have their own
    if key is None and cfg.stage != "pipeline":
        check_values(cfg)
        inputs = input_fingerprints(cfg)
    run = RunFolder(run_dir, cfg, key or config_key(cfg, inputs))
    if run.status == "finished":
        log.info("already finished, nothing to do")
        if not (run_dir / "report.md").is_file():
            write_result(run_dir)  # the run ended between its last two lines
        print_result(run_dir, brief=key is not None)
        return run.metrics
    if run.status == "resumed" and cfg.stage != "compare":
        log.info("%s: going on where it stopped", run_dir)
    if key is not None:
        inputs = input_fingerprints(cfg)
    run.record(inputs=inputs, code=code_digest(), **(changed or {}))
    L.seed_everything(cfg.seed, verbose=False)
    try:
        metrics = importlib.import_module(f"rlt.stages.{cfg.stage}").run(cfg, run)
        run.finish(metrics)
        write_result(run_dir)
    except (KeyboardInterrupt, SystemExit) as stop:
        terminated = isinstance(stop, SIGTERMException)
        if not (terminated or _is_ctrl_c(stop)):
            raise
        run.record(status="interrupted")
        if key is None:
            print(
                f"\nInterrupted. The same command with output_dir={run_dir} goes on from here.",
                flush=True,
            )
        raise SystemExit(_TERMINATED if terminated else _INTERRUPTED) from stop
    except Exception as error:
        run.record(status="failed", error=f"{type(error).__name__}: {error}")
        raise
    print_result(run_dir, brief=key is not None)
    return metrics


def _is_ctrl_c(stop: BaseException) -> bool:
    """Whether it is Ctrl-C, or the exit that Lightning or a pipeline's step made of it."""
    return isinstance(stop, KeyboardInterrupt) or (
        isinstance(stop, SystemExit)
        and stop.__context__ is not None
        and _is_ctrl_c(stop.__context__)
    )
