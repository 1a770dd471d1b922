"""`check=true`: build all that needs no weights, read the data, print what a run would do.

Tried are targets and keys, the values of every part that needs no weights, files, tokenizers, batch
arithmetic, whether sequences fit the models' contexts and training this machine's memory. What lies
on a hub that cannot be reached is named as not checked.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from rlt.data.batches import total_steps
from rlt.data.traces import find_traces
from rlt.preflight.inputs import (
    Seen,
    has_grader,
    model_name,
    read_problems,
    renderer_for,
    shape_for,
)
from rlt.preflight.memory_estimate import Shape
from rlt.preflight.probe import measure
from rlt.preflight.size import measured_lengths, memory_in_words, reads_traces, steps_or_batches
from rlt.report.study import Measure, read_study
from rlt.runs.identity import config_key
from rlt.stages.collect import require_grader
from rlt.stages.common import require_same_tokenizer
from rlt.stages.distill import check_explanations
from rlt.stages.examples import require_explanations
from rlt.stages.projection import check_all
from rlt.stages.score import check_score
from rlt.stages.teacher_rl import check_credit, check_student_choice
from rlt.stages.values import check_values

_RUN = ("config.yaml", "manifest.json", "metrics.json", "report.md", "report.html")
_TRAINED = (*_RUN, "model/", "checkpoints/")
ARTEFACT_FILES = {  # stage → what it leaves in its folder
    "pretrain": _TRAINED,
    "teacher_sft": _TRAINED,
    "teacher_rl": (*_TRAINED, "samples.jsonl", "held_out_rewards.jsonl", "preflight.json"),
    "collect": (*_RUN, "traces.jsonl or .parquet"),
    "distill": _TRAINED,
    "student_rl": (*_TRAINED, "samples.jsonl", "held_out_rewards.jsonl"),
    "score": (*_RUN, "scores.jsonl", "traces.jsonl or .parquet", "preflight.json"),
    "evaluate": (*_RUN, "answers.jsonl"),
    "compare": _RUN,
}
_EXPLAINED = ("pretrain", "teacher_sft")  # stages that learn from the data's own explanations


def print_plan(cfg: DictConfig, run_dir: Path) -> None:
    """Check a stage, or every step of a pipeline, and print the plan.

    Raises:
        ValueError, FileNotFoundError: whatever the run itself would stumble over.
    """
    table = Table(title=f"plan of stage={cfg.stage}")
    for column in ("step", "stage", "reads", "does"):
        table.add_column(column, overflow="fold")
    rows = check_plan(cfg)
    for row in rows:
        table.add_row(row.name, row.stage, row.reads, row.does)
    console = Console(width=None)
    console.print(table)
    for row in rows:
        for warning in row.warnings:
            console.print(f"warning: {row.name}: {warning}", style="yellow", soft_wrap=True)
    for row in rows:
        where = run_dir if cfg.stage != "pipeline" else Path(cfg.cache_dir) / row.stage / "<key>"
        files = ", ".join(ARTEFACT_FILES[row.stage])
        console.print(f"{row.name} leaves in {where}: {files}", soft_wrap=True)
    if cfg.probe:
        steps = check_all(cfg) if cfg.stage == "pipeline" else {cfg.stage: cfg}
        for row in rows:
            made_here = dict(cfg.steps[row.name].inputs) if cfg.stage == "pipeline" else {}
            told = measure(steps[row.name], made_here, row.steps)
            console.print(f"{row.name} {told}", soft_wrap=True)
    if cfg.stage == "pipeline":
        console.print(
            f"the pipeline leaves in {run_dir}: {', '.join(_RUN)}, steps/", soft_wrap=True
        )
    console.print(
        f"config {config_key(cfg)} is sound; "
        + ("nothing was kept" if cfg.probe else "nothing was loaded or written"),
    )


@dataclass(frozen=True)
class Row:
    """One step of a plan: what it reads and does, and what might go wrong with it.

    Attributes:
        steps: of training, or batches; None if not known.
    """

    name: str
    stage: str
    reads: str
    does: str
    warnings: list[str]
    steps: int | None = None


def check_plan(cfg: DictConfig) -> list[Row]:
    """Check a stage, or every step of a pipeline."""
    pipeline = cfg.stage == "pipeline"
    rows = []
    seen: Seen = {}
    for name, step in (check_all(cfg) if pipeline else {cfg.stage: cfg}).items():
        made_here = dict(cfg.steps[name].inputs) if pipeline else {}
        rows.append(check_stage(name, step, made_here, seen))
    return rows


def check_stage(name: str, cfg: DictConfig, made_here: Mapping[str, str], seen: Seen) -> Row:
    """Build a stage's parts without weights.

    Args:
        name: of the step.
        made_here: path key → earlier step of the pipeline that will make what lies there.
        seen: data that other steps have read already.
    """
    if cfg.stage == "compare":
        measure = Measure(cfg.metric, cfg.direction)
        study = read_study(cfg.runs, cfg.reference, cfg.evaluations, measure)
        done = sum(job.finished for job in study.jobs)
        runs = f"{done} finished of {len(study.jobs)} runs"
        arms = f"{len(study.arms)} arms, each against {study.reference.name}"
        return Row(name, cfg.stage, runs, arms, [])
    reads, does, warnings = [], [], []
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
    if cfg.stage == "score":
        check_score(cfg)
    parts = check_values(cfg)
    if cfg.stage == "teacher_rl":
        check_credit(parts["credit"], parts["reward"])
    if "reward" in parts and parts["reward"].correctness is not None and not has_grader(cfg):
        raise ValueError("this reward verifies answers: set data.grader (it is null)")
    if cfg.stage == "collect" and not cfg.sees_solution and not has_grader(cfg):
        require_grader(None)
    if cfg.stage == "student_rl" and not has_grader(cfg):
        raise ValueError("student RL verifies answers: set data.grader (it is null)")
    tokenizers = []
    shapes: dict[str, Shape] = {}
    for role in ("teacher", "student"):
        if cfg.get(role) is not None:
            renderer, why = renderer_for(cfg, role, parts["prompt"], made_here, seen)
            shape = shape_for(cfg, role, made_here, seen)
            size = f", {shape.parameters / 1e6:,.1f} M parameters" if shape is not None else ""
            reads.append(f"{role}: {model_name(cfg, role, made_here)}{size}{why}")
            shapes |= {role: shape} if shape is not None else {}
            tokenizers += [renderer.tokenizer] if renderer is not None else []
    if len(tokenizers) == 2:
        require_same_tokenizer(*tokenizers)
    problems, held_out, counted = read_problems(cfg, renderer, seen)
    reads.append(counted)
    train = None if problems is None else len(problems)
    reads_explanations = cfg.get("explanations") == "data" or cfg.stage in _EXPLAINED
    if problems is not None and reads_explanations:
        require_explanations(problems)
    if cfg.get("datamodule") is not None:
        does.append(_training(cfg, train, parts))
        if train is not None and not reads_traces(cfg) and cfg.datamodule.batch_size > train:
            warnings.append(
                f"datamodule.batch_size={cfg.datamodule.batch_size} is more than the {train} "
                "training problems: a step trains on some of them twice"
            )
    if cfg.stage == "collect":
        how_many = "all" if cfg.max_problems is None else cfg.max_problems
        which = "best" if cfg.rank == 1 else f"number {cfg.rank}"
        does.append(f"{which} of {cfg.best_of} for {how_many} problems, as {cfg.format}")
    if cfg.stage == "evaluate":
        does.append(f"{cfg.samples} answers to each of {train or '?'} questions")
    if "rollout" in parts:
        rollout = parts["rollout"]
        does.append(f"T = {rollout.temperature}, at most {rollout.max_new_tokens} new tokens")
    if problems is not None and renderer is not None:
        lengths = measured_lengths(cfg, renderer, problems + held_out, shapes, parts)
        does.append(str(lengths))
        if shapes.keys() >= {r for r in ("teacher", "student") if cfg.get(r) is not None}:
            told, warning = memory_in_words(cfg, shapes, lengths, parts)
            does.append(told)
            warnings += warning
    return Row(
        name, cfg.stage, "\n".join(reads), "\n".join(does), warnings, steps_or_batches(cfg, train)
    )


def _training(cfg: DictConfig, train: int | None, parts: dict[str, Any]) -> str:
    node = cfg.datamodule
    known = train if train is not None else 1
    if cfg.stage == "distill" and cfg.max_examples is not None:
        known = min(known, cfg.max_examples)
    steps = total_steps(known, node.batch_size, node.steps, node.epochs)
    shown = str(steps) if train is not None or node.steps else "?"
    text = f"{shown} steps of {node.batch_size}, lr {cfg.optim.lr}"
    if cfg.stage in ("teacher_rl", "student_rl"):
        n = node.batch_size * cfg.module.group_size
        algorithm = parts["algorithm"]
        if algorithm.minibatches > n:
            raise ValueError(
                f"algorithm.minibatches={algorithm.minibatches} exceeds the {n} completions of a "
                "step; lower it, or raise datamodule.batch_size"
            )
        optimizer_steps = steps * algorithm.optimizer_steps_per_rollout
        text += f"\n{n} completions a step, {optimizer_steps} optimizer steps in all"
    return text
