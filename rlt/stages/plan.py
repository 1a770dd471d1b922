"""`check=true`: build all that needs no weights, read the data, print what a run would do.

Everything a bad config can get wrong is tried: targets and keys, values, files, batch arithmetic,
token budgets. What lies on a hub that cannot be reached is named as not checked.
"""

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from rlt.data.datamodule import total_steps
from rlt.data.prompts import Views
from rlt.runtime import build, config_key
from rlt.stages.distill import check_explanations
from rlt.stages.pipeline import check_all
from rlt.stages.teacher_rl import check_student_choice
from rlt.traces import find_traces

log = logging.getLogger(__name__)


def print_plan(cfg: DictConfig, run_dir: Path) -> None:
    """Check a stage, or every step of a pipeline, and print the plan.

    Raises:
        ValueError, FileNotFoundError: whatever the run itself would stumble over.
    """
    pipeline = cfg.stage == "pipeline"
    steps = check_all(cfg) if pipeline else {cfg.stage: cfg}
    table = Table(title=f"plan of stage={cfg.stage}", show_lines=True)
    for column in ("step", "stage", "reads", "does"):
        table.add_column(column, overflow="fold")
    for name, step in steps.items():
        made_here = set(cfg.steps[name].needs) if pipeline else set()
        facts = check_stage(step, made_here)
        table.add_row(name, step.stage, facts["reads"], facts["does"])
    console = Console(width=None)
    console.print(table)
    console.print(
        f"writes to {run_dir}" + (f" and {cfg.store_dir}" if pipeline else ""),
        f"\nconfig {config_key(cfg)} is sound; nothing was loaded or written",
    )


def check_stage(cfg: DictConfig, made_here: set[str]) -> dict[str, str]:
    """Build a stage's parts without weights.

    Args:
        made_here: path keys that an earlier step of the pipeline will make.
    """
    reads, does = [], []
    for role in ("teacher", "student"):
        path = cfg.get(f"{role}_path")
        if path is not None and f"{role}_path" not in made_here and not Path(path).is_dir():
            raise FileNotFoundError(f"{role}_path={path}: no such folder; give <run>/model")
    if cfg.stage == "distill":
        check_explanations(cfg)
        if cfg.traces is not None and "traces" not in made_here:
            find_traces(cfg.traces)
    if cfg.stage == "teacher_rl":
        check_student_choice(cfg)
    parts = {
        key: build(cfg[key])
        for key in ("prompt", "reward", "algorithm", "rollout")
        if cfg.get(key) is not None
    }
    role = "teacher" if cfg.get("teacher") is not None else "student"
    views, why = _views(cfg, role, parts["prompt"], made_here)
    reads.append(f"{role}: {_model_name(cfg, role)}{why}")
    train, counted = _problems(cfg, views)
    reads.append(counted)
    if cfg.get("datamodule") is not None:
        does.append(_training(cfg, train, parts))
    if cfg.stage == "collect":
        problems = "all" if cfg.max_problems is None else cfg.max_problems
        does.append(f"best of {cfg.best_of} for {problems} problems, as {cfg.format}")
    if cfg.stage == "evaluate":
        does.append(f"{cfg.samples} answers to each of {train or '?'} questions")
    if "rollout" in parts:
        rollout = parts["rollout"]
        does.append(f"T = {rollout.temperature}, at most {rollout.max_new_tokens} new tokens")
    return {"reads": "\n".join(reads), "does": "\n".join(does)}


def _model_name(cfg: DictConfig, role: str) -> str:
    node = cfg[role]
    default = node.get("path") or node.get("package") or node["_target_"].rpartition(".")[2]
    return str(cfg.get(f"{role}_path") or default)


def _views(cfg: DictConfig, role: str, style: Any, made_here: set[str]) -> tuple[Any, str]:
    """Views with the role's tokenizer, or None and why there is none to look at."""
    from rlt.stages.common import source_of

    source = source_of(cfg, role) if f"{role}_path" not in made_here else build(cfg[role])
    try:
        return Views(style, source.tokenizer()), ""
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not getattr(source, "path", "").count("/") == 1:
            raise
        log.debug("tokenizer: %s", error)
        return None, " (hub not reached: tokenizer not checked)"


def _problems(cfg: DictConfig, views: Any) -> tuple[int | None, str]:
    """Number of training problems (or questions), and a line about what was read."""
    forbidden = views.forbidden if views is not None else build(cfg.prompt).forbidden
    count = views.count_tokens if views is not None else len
    try:
        if cfg.stage == "evaluate":
            benchmark = build(cfg.benchmark)
            questions = benchmark.load(build(cfg.prompt).forbidden, count)
            return len(questions), f"benchmark {benchmark.name}: {len(questions)} questions"
        split = build(cfg.data).load(forbidden, count)
    except ValueError as error:
        if not isinstance(error.__cause__, ConnectionError):
            raise
        name = f"benchmark {cfg.benchmark.name}" if cfg.stage == "evaluate" else "data"
        return None, f"{name}: hub not reached, not checked"
    bad = sum(split.report["bad"].values())
    return len(split.train), (
        f"data: {len(split.train)} training, {len(split.validation)} held out"
        + (f", {bad} broken rows skipped" if bad else "")
    )


def _training(cfg: DictConfig, train: int | None, parts: dict[str, Any]) -> str:
    node = cfg.datamodule
    known = train if train is not None else 1
    if cfg.stage == "distill" and cfg.max_examples is not None:
        known = min(known, cfg.max_examples)
    steps = total_steps(known, node.batch_size, node.steps, node.epochs)
    shown = str(steps) if train is not None or node.steps else "?"
    text = f"{shown} steps of {node.batch_size}, lr {cfg.optim.lr}"
    if cfg.stage == "teacher_rl":
        n = node.batch_size * cfg.module.completions_per_problem
        algorithm = parts["algorithm"]
        if algorithm.minibatches > n:
            raise ValueError(
                f"algorithm.minibatches={algorithm.minibatches} exceeds the {n} completions of a "
                "step; lower it, or raise datamodule.batch_size"
            )
        optimizer_steps = steps * algorithm.optimizer_steps_per_rollout
        text += f"\n{n} completions a step, {optimizer_steps} optimizer steps in all"
    return text
