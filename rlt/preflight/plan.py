"""`check=true` builds everything that needs no weights, reads the data and prints the plan.

It checks targets and keys, the values of all parts that need no weights, files, tokenizers and
batch arithmetic. It also checks that sequences fit the models' contexts and that training fits the
memory of this machine. The plan names whatever could not be checked because a hub was not reached.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from rlt.preflight.budget import tokens_that_fit
from rlt.preflight.inputs import Seen, look_at
from rlt.preflight.memory_advice import memory_in_words, with_settings
from rlt.preflight.probe import measure
from rlt.runs.identity import config_key
from rlt.stages.pipeline import Pipeline
from rlt.stages.stage import Inputs, ModelStage, Stage


@dataclass(frozen=True)
class Row:
    """One step of a plan: what it reads, what it does, and warnings.

    Attributes:
        leaves: files that the step writes to its folder.
        steps: number of training steps or batches; None if not known.
    """

    name: str
    stage: str
    reads: str
    does: str
    warnings: list[str]
    leaves: tuple[str, ...]
    steps: int | None = None


def print_plan(cfg: DictConfig, stage: Stage, run_dir: Path) -> None:
    """Check a stage, or every step of a pipeline, and print the plan.

    Raises:
        ValueError, FileNotFoundError: the run itself would fail with this error.
    """
    table = Table(title=f"plan of stage={cfg.stage}")
    for column in ("step", "stage", "reads", "does"):
        table.add_column(column, overflow="fold")
    rows = check_plan(cfg, stage)
    for row in rows:
        table.add_row(row.name, row.stage, row.reads, row.does)
    console = Console(width=None)
    console.print(table)
    for row in rows:
        for warning in row.warnings:
            console.print(f"warning: {row.name}: {warning}", style="yellow", soft_wrap=True)
    pipeline = stage if isinstance(stage, Pipeline) else None
    for row in rows:
        where = Path(pipeline.cache_dir) / row.stage / "<key>" if pipeline else run_dir
        console.print(f"{row.name} leaves in {where}: {', '.join(row.leaves)}", soft_wrap=True)
    if cfg.probe:
        configs = pipeline.configs if pipeline else {cfg.stage: cfg}
        stages = pipeline.stages if pipeline else {cfg.stage: stage}
        for row in rows:
            made_here = pipeline.plan[row.name].inputs if pipeline else {}
            told = measure(configs[row.name], stages[row.name], made_here, row.steps)
            console.print(f"{row.name} {told}", soft_wrap=True)
    if pipeline:
        console.print(
            f"the pipeline leaves in {run_dir}: {', '.join(pipeline.leaves)}", soft_wrap=True
        )
    console.print(
        f"config {config_key(cfg)} is sound; "
        + ("nothing was kept" if cfg.probe else "nothing was loaded or written"),
    )


def check_plan(cfg: DictConfig, stage: Stage) -> list[Row]:
    """Check a stage, or every step of a pipeline, and return a row for each."""
    seen: Seen = {}
    if not isinstance(stage, Pipeline):
        return [check_stage(cfg.stage, cfg, stage, {}, seen)]
    return [
        check_stage(name, step, stage.stages[name], stage.plan[name].inputs, seen)
        for name, step in stage.configs.items()
    ]


def check_stage(
    name: str, cfg: DictConfig, stage: Stage, made_here: Mapping[str, str], seen: Seen
) -> Row:
    """Check a stage's models, tokenizers and problems without loading weights.

    Args:
        name: the name of the step.
        made_here: path key → earlier step of the pipeline that will make the file or model.
        seen: inputs that other steps have already read.
    """
    if not isinstance(stage, ModelStage):
        inputs = stage.look()
        return _row(name, cfg, stage, [inputs.in_words], [], inputs)
    seen_here = look_at(cfg, stage, made_here, seen)
    shapes, lengths = seen_here.shapes, seen_here.lengths
    lines, warnings = [], []
    if lengths is not None:
        lines.append(str(lengths))
    if lengths is not None and shapes.keys() >= set(stage.roles):
        if stage.hardware.tokens_per_micro_batch == "auto":
            tokens = tokens_that_fit(stage, shapes, lengths)
            stage = with_settings(stage, {"hardware.tokens_per_micro_batch": tokens})
            lines.append(f"tokens_per_micro_batch=auto: {tokens} in the memory free now")
        memory, warning = memory_in_words(stage, shapes, lengths)
        lines.append(memory)
        warnings += warning
    return _row(name, cfg, stage, seen_here.reads, lines, seen_here.inputs, warnings)


def _row(
    name: str,
    cfg: DictConfig,
    stage: Stage,
    reads: list[str],
    lines: list[str],
    inputs: Inputs,
    warnings: list[str] | None = None,
) -> Row:
    return Row(
        name=name,
        stage=cfg.stage,
        reads="\n".join(reads),
        does="\n".join([*stage.does(inputs), *lines]),
        warnings=[*stage.warnings(inputs), *(warnings or [])],
        leaves=stage.files,
        steps=stage.count_steps(inputs),
    )
