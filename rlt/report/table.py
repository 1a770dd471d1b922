"""Tables for the terminal: a finished run ends with its numbers and the paths of its reports."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlt.report.comparison import (
    Benchmark,
    Comparison,
    Step,
    accuracy_header,
    accuracy_rows,
    benchmarks_of,
    compare,
    steps_of,
)
from rlt.report.folder import Run
from rlt.report.pipeline import status
from rlt.report.results import result_lines
from rlt.report.run import REPORT_FILE, metric_rows
from rlt.runs.formatting import duration, points


def print_table(
    steps: Sequence[Mapping[str, Any]], run_dir: Path, console: Console | None = None
) -> None:
    """Print the evaluations side by side, the steps of a pipeline, and the report's path.

    Args:
        steps: the entries of steps.json.
    """
    console = console or Console()
    found = steps_of(steps, run_dir)
    for benchmark in benchmarks_of(found):
        against = {c.other.name: c for c in compare(benchmark)}
        table = Table(title=escape(_title(benchmark)), title_justify="left")
        header = accuracy_header(benchmark)[:-1]
        table.add_column(header[0])
        for name in header[1:]:
            table.add_column(escape(name.replace(" [", "\n[")), justify="right", no_wrap=True)
        if against:
            table.add_column("last minus this\n(points, paired)", justify="right", no_wrap=True)
        for step, row in zip(benchmark.steps, accuracy_rows(benchmark), strict=True):
            last = [_difference(against[step.name])] if step.name in against else []
            table.add_row(*(escape(cell) for cell in [*row[:-1], *last]))
        console.print(table)
    console.print(_steps_table(found))
    _print_note(Run(run_dir), console)
    console.print(f"report:      {run_dir / REPORT_FILE}", markup=False, soft_wrap=True)
    hint = f"tensorboard --logdir {_log_dir(found, run_dir)}"
    console.print(f"TensorBoard: {hint}", markup=False, soft_wrap=True)


def print_run(run_dir: Path, console: Console | None = None, brief: bool = False) -> None:
    """Print a stage's result in sentences, then its metrics and the report's path.

    Args:
        brief: print the sentences only.
    """
    console = console or Console()
    run = Run(run_dir)
    for line in result_lines(run):
        console.print(line, markup=False)
    if brief:
        return
    header, rows = metric_rows(run.metrics)
    if rows:
        table = Table(title=escape(run.stage), title_justify="left")
        table.add_column(header[0])
        for name in header[1:]:
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
    _print_note(run, console)
    console.print(f"report:      {run_dir / REPORT_FILE}", markup=False, soft_wrap=True)
    hint = f"tensorboard --logdir {_log_dir([], run_dir)}"
    console.print(f"TensorBoard: {hint}", markup=False, soft_wrap=True)


def _print_note(run: Run, console: Console) -> None:
    if run.note:
        console.print(run.note, style="italic", markup=False)


def _title(benchmark: Benchmark) -> str:
    questions = len({answer.problem_id for answer in benchmark.steps[-1].run.answers})
    return " ".join(
        ["accuracy", *([f"on {benchmark.name}"] if benchmark.name else [])]
        + ([f"({questions} questions)"] if questions else [])
    )


def _difference(comparison: Comparison) -> str:
    difference = comparison.difference
    interval = f"{points(difference.mean)} [{points(difference.low)}, {points(difference.high)}]"
    return interval if comparison.verdict == "better" else f"{interval}\n{comparison.verdict}"


def _steps_table(steps: Sequence[Step]) -> Table:
    table = Table(title="steps", title_justify="left")
    for name in ("step", "stage", "status"):
        table.add_column(name)
    table.add_column("time", justify="right")
    for step in steps:
        style = "dim" if step.reused else None
        table.add_row(
            escape(step.name), escape(step.stage), status(step), duration(step.seconds), style=style
        )
    return table


def _log_dir(steps: Sequence[Step], run_dir: Path) -> str:
    """Return the folder above all event files, relative to the working directory if it is below."""
    folders = [os.path.abspath(folder) for folder in (run_dir, *(s.run.folder for s in steps))]
    common = Path(os.path.commonpath(folders))
    if len(common.parts) <= 2:  # too far up to be searched
        common = Path(folders[0])
    here = Path.cwd()
    return str(common.relative_to(here) if common.is_relative_to(here) else common)
