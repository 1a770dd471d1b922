"""`rlt stage=pipeline`: every step of a config, in order, each done once.

A step's result lies in `cache_dir/<stage>/<key>`, where the key is a hash of its config and of what
it reads. A result that is there is reused, one that was begun is gone on with, any other is made.
Steps that two pipelines have in common (a base model, a warm-up) are therefore made once.
"""

import contextlib
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock
from omegaconf import DictConfig

from rlt.config.allowed_targets import ConfigError, raise_if_any
from rlt.config.build import build_stage
from rlt.config.fields import passes
from rlt.config.suggestions import did_you_mean
from rlt.llm.device import return_freed_memory
from rlt.runs import ranks
from rlt.runs.files import write_json
from rlt.runs.folder import RunFolder
from rlt.stages.run import run_stage
from rlt.stages.stage import RUN_FILES, Stage
from rlt.stages.steps import Step, read_steps, step_config, step_configs, step_key

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Pipeline(Stage):
    """Runs stages one after another, each on what the ones before it made.

    The config holds every shared group once, and each stage's own part under the stage's name; any
    further key with a stage's `_target_` is such a part. `Pipeline.from_config` builds every step's
    stage, so that all that is wrong with any of them is told before the first one runs.
    """

    hardware: Any
    logger: Any = passes("save_dir")
    teacher: Any
    teacher_path: str | None
    student: Any
    student_path: str | None
    data: Any
    prompt: Any
    reward: Any
    credit: Any
    algorithm: Any
    adapter: Any
    benchmark: Any
    steps: Any
    cache_dir: str

    name: ClassVar[str] = "pipeline"
    leaves: ClassVar[tuple[str, ...]] = (*RUN_FILES, "steps/")
    walked_again: ClassVar[bool] = True
    takes_stages: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.config: DictConfig = DictConfig({})
        self.plan: dict[str, Step] = {}
        self.configs: dict[str, DictConfig] = {}
        self.stages: dict[str, Stage] = {}

    @classmethod
    def from_config(cls, cfg: DictConfig) -> "Pipeline":
        """A pipeline with every step's stage built.

        Raises:
            ConfigError: everything that is wrong with any step.
        """
        made = cls(**{one.name: cfg.get(one.name) for one in fields(cls)})
        made.config, made.plan = cfg, read_steps(cfg)
        errors = []
        made.configs = step_configs(cfg, made.plan)
        for name, step_cfg in made.configs.items():
            try:
                made.stages[name] = build_stage(step_cfg, made.plan[name].inputs)
            except ConfigError as error:
                errors += [f"step {name}: {one}" for one in error.errors]
            except (ValueError, OSError) as error:
                errors.append(f"step {name}: {error}")
        raise_if_any(errors)
        return made

    def run(self, run: RunFolder) -> dict[str, float]:
        folders: dict[str, Path] = {}
        keys: dict[str, str] = {}
        done: list[dict[str, Any]] = []
        metrics: dict[str, float] = {}
        for number, (name, step) in enumerate(self.plan.items(), start=1):
            stage_cfg = step_config(self.config, name, step, folders)
            keys[name] = step_key(stage_cfg, step, keys)
            folder = folders[name] = (Path(self.cache_dir) / step.stage / keys[name]).absolute()
            stage_cfg.output_dir = str(folder)
            folder.parent.mkdir(parents=True, exist_ok=True)
            started = time.perf_counter()
            with FileLock(f"{folder}.lock") if ranks.is_main() else contextlib.nullcontext():
                reused = ranks.from_main((folder / "metrics.json").is_file, name)
                log.info(
                    "\n── step %d of %d: %s (stage %s)%s", number, len(self.plan), name, step.stage,
                    ", reused" if reused else "",
                )  # fmt: skip
                stage = self.stages[name]
                for key in step.inputs:
                    setattr(stage, key, stage_cfg[key])
                result = run_stage(stage_cfg, folder, keys[name], stage=stage)
            return_freed_memory()
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


def check_gate(name: str, step: Step, metrics: Mapping[str, float]) -> None:
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
    if not ranks.is_main():
        return
    link.parent.mkdir(exist_ok=True)
    try:
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(folder, link.parent), target_is_directory=True)
    except OSError as error:  # a file system without links
        log.debug("%s: %s", link, error)
