"""Two runs side by side: their configs, their environments, and where results first differ."""

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlt.report.equality import (
    ABSENT,
    Changes,
    ResultComparison,
    changes_between,
    compare_results,
    untimed,
)
from rlt.report.folder import Run
from rlt.runs.identity import config_changes, flatten

_SHOWN = 20  # differing places that are printed; the first ones tell why
_FACTS = ("rlt", "git", "code", "packages", "hardware")


def require_run(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no run.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give the folder of a run")
    missing = [n for n in ("config.yaml", "manifest.json") if not (folder / n).is_file()]
    if missing:
        raise ValueError(f"{folder} holds no run: {' and '.join(missing)} not found")
    return Run(folder)


def metadata_changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> Changes:
    """Return the code, packages, hardware and inputs in which two manifests differ.

    A value that is missing from one of them is `-`. Two commits count as equal if their code
    computes the same.
    """
    facts_a, facts_b = _facts(a), _facts(b)
    if facts_a.get("code") == facts_b.get("code") is not None:
        facts_a.pop("git", None), facts_b.pop("git", None)
    return changes_between(facts_a, facts_b)


def _facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    facts = {name: manifest[name] for name in _FACTS if name in manifest}
    if inputs := manifest.get("inputs"):
        # The description of a data source is kept as the text of a mapping.
        facts["inputs"] = {
            key: ast.literal_eval(text) if text.startswith("{") else text
            for key, text in inputs.items()
        }
    return flatten(facts)


def show_difference(a: Path, b: Path) -> int:
    """Print how two runs differ in config, environment and metrics, and where results first differ.

    Returns:
        0 if nothing differs, 1 otherwise, as the program diff does.

    Raises:
        FileNotFoundError, ValueError: one of the folders holds no run.
    """
    run_a, run_b = require_run(a), require_run(b)
    console = Console()
    console.print(f"a: {a}\nb: {b}", markup=False, soft_wrap=True)
    config = config_changes(*(OmegaConf.load(folder / "config.yaml") for folder in (a, b)))
    metadata = metadata_changes(run_a.manifest, run_b.manifest)
    metrics = [
        (name, x, y, ABSENT if ABSENT in (x, y) else f"{y - x:+.4g}")
        for name, (x, y) in changes_between(*map(untimed, (run_a.metrics, run_b.metrics))).items()
    ]
    _print_table(console, "config", ("key", "a", "b"), [(k, *v) for k, v in config.items()])
    _print_table(console, "ran on", ("fact", "a", "b"), [(k, *v) for k, v in metadata.items()])
    _print_table(console, "metrics", ("metric", "a", "b", "b - a"), metrics)
    results = compare_results(a, b)
    print_comparison(console, results, ("a", "b"))
    return int(bool(config or metadata or results.differences))


def print_comparison(console: Console, results: ResultComparison, names: tuple[str, str]) -> None:
    """Print where the results first differ, or that they are equal; earliest step first."""
    more = len(results.differences) - _SHOWN
    title = "results, earliest step first" + (f" (and {more} more)" if more > 0 else "")
    rows = [difference[:3] for difference in results.differences[:_SHOWN]]
    _print_table(console, title, ("where", *names), rows)
    console.print(str(results), markup=False, highlight=False, soft_wrap=True)


def _print_table(
    console: Console, title: str, header: tuple[str, ...], rows: list[tuple[Any, ...]]
) -> None:
    """Print the rows as a table, or nothing if there are no rows."""
    table = Table(title=title, title_justify="left")
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    if rows:
        console.print(table)
