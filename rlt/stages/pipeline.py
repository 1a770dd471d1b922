"""`rlt stage=pipeline`: every step of a config, in order, each done once.

A step's result lies in `cache_dir/<stage>/<key>`, where the key is a hash of its config and of what
it reads. A result that is there is reused, one that was begun is gone on with, any other is made.
Steps that two pipelines have in common (a base model, a warm-up) are therefore made once.
"""

import logging
import os
import time
from pathlib import Path
from typing import Any

from filelock import FileLock
from omegaconf import DictConfig

from rlt.config.suggestions import did_you_mean
from rlt.preflight.plan import check_plan
from rlt.runs.files import write_json
from rlt.runs.folder import RunFolder
from rlt.stages.projection import step_config, step_key

log = logging.getLogger(__name__)


def run(cfg: DictConfig, run: RunFolder) -> dict[str, float]:
    from rlt.stages import run_stage

    check_plan(cfg)
    folders: dict[str, Path] = {}
    keys: dict[str, str] = {}
    done: list[dict[str, Any]] = []
    metrics: dict[str, float] = {}
    for number, (name, step) in enumerate(cfg.steps.items(), start=1):
        stage_cfg = step_config(cfg, name, folders)
        keys[name] = step_key(stage_cfg, step, keys)
        folder = folders[name] = (Path(cfg.cache_dir) / step.stage / keys[name]).absolute()
        stage_cfg.output_dir = str(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with FileLock(f"{folder}.lock"):
            reused = (folder / "metrics.json").is_file()
            log.info(
                "\n── step %d of %d: %s (stage %s)%s", number, len(cfg.steps), name, step.stage,
                ", reused" if reused else "",
            )  # fmt: skip
            result = run_stage(stage_cfg, folder, keys[name])
        _link(run.folder / "steps" / name, folder)
        done.append(
            {
                "name": name,
                "stage": step.stage,
                "inputs": dict(step.inputs),
                "label": step.label or name,
                "dir": str(folder),
                "key": keys[name],
                "reused": reused,
                "seconds": time.perf_counter() - started,
                "metrics": result,
            }
        )
        write_json(run.folder / "steps.json", done)
        metrics |= {f"{name}/{key}": value for key, value in result.items()}
        check_gate(name, step, result)
    return metrics


def check_gate(name: str, step: DictConfig, metrics: dict[str, float]) -> None:
    """Raises ValueError when a step fell short of what later ones are worth running for."""
    for metric, least in step.gate.items():
        if metric not in metrics:
            raise ValueError(
                f"steps.{name}.gate.{metric}: stage {step.stage} has no such metric"
                f"{did_you_mean(metric, metrics)}; it has {', '.join(sorted(metrics))}"
            )
        if not metrics[metric] >= least:  # NaN falls short, too
            raise ValueError(
                f"steps.{name}: {metric} is {metrics[metric]:.4g}, less than the {least:.4g} of "
                f"steps.{name}.gate: the steps after it would say nothing. Train what it "
                "measures for longer, or lower the bar"
            )


def _link(link: Path, folder: Path) -> None:
    """A step's result under the step's name, beside the pipeline's own report."""
    link.parent.mkdir(exist_ok=True)
    try:
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(folder, link.parent), target_is_directory=True)
    except OSError as error:  # a file system without links
        log.debug("%s: %s", link, error)
