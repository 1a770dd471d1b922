"""Stages: each reads and writes plain artefacts in a run folder of its own.

A stage is a module with `run(cfg, run)`, given its config and its claimed run folder, returning
its final metrics.
"""

import importlib
import logging
from pathlib import Path

from omegaconf import DictConfig

from rlt.runtime import RunFolder

log = logging.getLogger(__name__)


def run_stage(cfg: DictConfig, run_dir: Path, key: str | None = None) -> dict[str, float]:
    """Run one stage in its folder: from the start, from where it stopped, or not again.

    Args:
        key: identity of the run's config and inputs; made from the config if None.
    """
    import lightning as L
    import torch

    from rlt.report import write_report

    run = RunFolder(run_dir, cfg, key)
    if run.status == "finished":
        log.info("%s: already finished, nothing to do", run_dir)
        return run.metrics
    if run.status == "resumed":
        log.info("%s: going on where it stopped", run_dir)
    if cfg.hardware.threads is not None:
        torch.set_num_threads(cfg.hardware.threads)
    L.seed_everything(cfg.seed, verbose=False)
    metrics = importlib.import_module(f"rlt.stages.{cfg.stage}").run(cfg, run)
    run.finish(metrics)
    write_report(run_dir)
    return dict(metrics)
