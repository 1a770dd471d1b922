"""Problems in JSONL, CSV or Parquet files, by a mapping from field to column.

Files are streamed. CSV values are text and nothing else, so `007` and `1e3` stay as written; an
empty explanation or system cell is none at all. A line that cannot be read is a bad row with its
number, not an exception.
Used by `rlt stage=teacher_sft data=jsonl 'data.source.files=my/*.jsonl'` (or data=csv, parquet).
"""

import csv
import glob
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlt.config.suggestions import did_you_mean
from rlt.data.problem import content_hash
from rlt.data.rows import (
    REQUIRED_FIELDS,
    UNDECODABLE,
    WRONG_TYPE,
    RawRow,
    RowError,
    check_columns,
    excerpt,
    map_columns,
)

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet"}
CELL_LIMIT_CHARS = 2**30  # the csv module's own 131,072 is less than a long explanation
ROWS_PER_BATCH = 1024


class TableFiles:
    """Problems of table files.

    Args:
        files: a path, a glob pattern, or a list of them; read in this order, a glob sorted.
        columns: field (question, solution, explanation, system) -> column; None: not there.
        format: jsonl, csv or parquet; None: by each file's ending.
    """

    def __init__(
        self,
        files: str | Sequence[str],
        columns: Mapping[str, str | None],
        format: str | None = None,
    ) -> None:
        self.columns = check_columns(columns)
        self.files = files
        self.format = _check_format(format)

    def rows(self) -> Iterator[RawRow]:
        never_seen = {f: c for f, c in self.columns.items() if f not in REQUIRED_FIELDS}
        any_readable = False
        for raw in read_files(self.files, self.format, list(self.columns.values())):
            any_readable = any_readable or raw.fault is None
            never_seen = {f: c for f, c in never_seen.items() if c not in raw.values}
            yield map_columns(raw, self.columns, optional_may_lack=True)
        if any_readable and never_seen:
            field, column = next(iter(never_seen.items()))
            raise ValueError(
                f"data.source.columns.{field}={column!r}: no row of {self.files} has this column; "
                f"name one that is there, or set data.source.columns.{field}=null"
            )

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "TableFiles",
            "files": [str(path) for path in expand_files(self.files)],
            "columns": self.columns,
            "fingerprint": content_hash(
                fingerprint_files(self.files), json.dumps(self.columns, sort_keys=True)
            ),
        }


def expand_files(files: str | Sequence[str]) -> list[Path]:
    """Existing files that paths and glob patterns stand for, each once."""
    patterns = [files] if isinstance(files, str) else list(files)
    if not patterns:
        raise ValueError("data.source.files is empty; give a path, a glob pattern or a list")
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            raise ValueError(f"{pattern} is a folder; name its files, e.g. '{pattern}/*.jsonl'")
        matches = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path))))
        found += [match for match in matches if match.is_file()]
        if not matches:
            raise FileNotFoundError(missing_path(path))
    return list(dict.fromkeys(found))


def missing_path(path: Path) -> str:
    """An error text for a path that is not there, with the nearest name that is."""
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    missing = path.relative_to(folder).parts[0]
    hint = did_you_mean(missing, sorted(entry.name for entry in folder.iterdir()))
    return (
        f"{path}: no such file; {folder.resolve()} has no {missing!r}{hint}. "
        "Paths are relative to the folder in which rlt is started"
    )


def fingerprint_files(files: str | Sequence[str]) -> str:
    """Hash over the bytes of the files, in order; their names do not matter."""
    digests = []
    for path in expand_files(files):
        with path.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return content_hash(*digests)


def read_files(
    files: str | Sequence[str], format: str | None, columns: Sequence[str]
) -> Iterator[RawRow]:
    """Rows of all files with values by column name; Parquet reads only the columns named."""
    for path in expand_files(files):
        kind = format or FORMATS.get(path.suffix.lower())
        if kind is None:
            raise ValueError(
                f"{path}: the ending {path.suffix!r} is none of {', '.join(FORMATS)}; "
                "say what it is with data.source.format=jsonl|csv|parquet"
            )
        if kind == "jsonl":
            yield from read_jsonl(path)
        elif kind == "csv":
            yield from read_csv(path)
        else:
            yield from read_parquet(path, columns)


def read_jsonl(path: Path) -> Iterator[RawRow]:
    """One JSON object per line; the row number is the line number, blank lines are passed over."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line.decode("utf-8-sig"))
            except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
                fault = RowError(UNDECODABLE, f"{error}: {excerpt(line)}")
                yield RawRow(str(path), number, {}, fault)
                continue
            if isinstance(values, dict):
                yield RawRow(str(path), number, values)
            else:
                what = f"the line holds a {type(values).__name__}, not an object"
                fault = RowError(WRONG_TYPE, f"{what}: {excerpt(values)}")
                yield RawRow(str(path), number, {}, fault)


def read_csv(path: Path) -> Iterator[RawRow]:
    """Rows under a header line; broken UTF-8 is kept as surrogates, which no field may hold."""
    csv.field_size_limit(CELL_LIMIT_CHARS)
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
        reader = csv.reader(stream, strict=True)
        header = next(reader, None)
        if header is None:
            raise ValueError(f"{path} is empty; a CSV file starts with a line of column names")
        if len(set(header)) < len(header):
            raise ValueError(f"{path}: column names repeat: {', '.join(header)}; rename them")
        number = 0
        while True:
            number += 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                fault = RowError(UNDECODABLE, str(error))
                yield RawRow(str(path), number, {}, fault, reader.line_num)
                continue
            if not cells:  # a blank line
                number -= 1
                continue
            if len(cells) != len(header):
                detail = f"{len(cells)} cells under {len(header)} column names: {excerpt(cells)}"
                fault = RowError(WRONG_TYPE, detail)
                yield RawRow(str(path), number, {}, fault, reader.line_num)
                continue
            values = {name: cell or None for name, cell in zip(header, cells, strict=True)}
            yield RawRow(str(path), number, values, None, reader.line_num)


def read_parquet(path: Path, columns: Sequence[str]) -> Iterator[RawRow]:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [name for name in names if name in columns] or names
            number = 0
            for batch in file.iter_batches(batch_size=ROWS_PER_BATCH, columns=wanted):
                for values in batch.to_pylist():
                    number += 1
                    yield RawRow(str(path), number, values)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from error


def _check_format(format: str | None) -> str | None:
    known = sorted(set(FORMATS.values()))
    if format is not None and format not in known:
        raise ValueError(
            f"data.source.format={format!r}; it must be one of {', '.join(known)}"
            f"{did_you_mean(format, known)}, or null: by the file's ending"
        )
    return format
