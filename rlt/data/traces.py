"""Trace files. Each row is an explanation with its origin and its scores."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlt.data.sources.files import TableFiles, read_files

FORMATS = ("jsonl", "parquet")


def write_traces(rows: Sequence[dict[str, Any]], folder: Path, format: str) -> Path:
    """Write `traces.<format>` atomically.

    Args:
        rows: one dictionary for each trace; at least one.
        folder: the folder of the file.
        format: `jsonl` or `parquet`.

    Returns:
        The path of the file.

    Raises:
        ValueError: the format is neither jsonl nor parquet.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: choose {' or '.join(FORMATS)}")
    assert rows, "there are no traces to write"
    path = folder / f"traces.{format}"
    temporary = path.with_suffix(".tmp")
    if format == "parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), temporary)
    else:
        _write_lines(rows, temporary)
    temporary.replace(path)
    return path


def write_rows(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Write a JSONL file atomically."""
    temporary = path.with_suffix(".tmp")
    _write_lines(rows, temporary)
    temporary.replace(path)


def _write_lines(rows: Iterable[dict[str, Any]], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def find_traces(path: str) -> Path:
    """Return the trace file that the option `traces=` names.

    Args:
        path: the file, the file without its ending (`<run>/traces`), or the folder of the file.

    Raises:
        FileNotFoundError: there is no such file.
    """
    named = Path(path)
    candidates = [named, *(named.with_name(f"{named.name}.{f}") for f in FORMATS)]
    candidates += [named / f"traces.{f}" for f in FORMATS]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"traces={path}: no such file; give <run>/traces of a collect run, or a JSONL, CSV or "
        "Parquet file with the columns question, solution and explanation"
    )


def trace_source(path: str) -> TableFiles:
    """Return traces as a data source, so that their rows are checked like those of other sources.

    Args:
        path: see `find_traces`.

    Raises:
        FileNotFoundError: there is no such file.
    """
    files = [str(find_traces(path))]
    columns: dict[str, str | None] = {n: n for n in ("question", "solution", "explanation")}
    if any("system" in row.values for row in read_files(files, None, ["system"])):
        columns["system"] = "system"  # traces of other programs may lack it
    return TableFiles(files, columns)
