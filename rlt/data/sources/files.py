"""Problems in JSONL, CSV or Parquet files. The config maps each field to a column.

Files are streamed. Values in CSV files are always text, so `007` and `1e3` stay as they are. An
empty cell counts as missing. A line that cannot be read becomes a bad row with its number and does
not raise an error.

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
from rlt.data.row_checks import check_columns, map_columns
from rlt.data.rows import REQUIRED_FIELDS, UNDECODABLE, WRONG_TYPE, RawRow, RowError, excerpt

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet"}
CELL_LIMIT_CHARS = 2**30  # a long explanation exceeds the csv module's default of 131,072
ROWS_PER_BATCH = 1024


class TableFiles:
    """A source of problems in table files.

    Args:
        files: a path, a glob pattern, or a list of them. They are read in this order; the files of
            a glob pattern are sorted.
        columns: column of each field (question, solution, explanation, system); None if there is
            no such column.
        format: jsonl, csv or parquet; None decides by the ending of each file.

    Raises:
        ValueError: a field or the format is unknown, or question or solution has no column.
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
        """Yield the rows of all files.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a file as a whole cannot be read, or no row has the column of a field.
        """
        absent_columns = {f: c for f, c in self.columns.items() if f not in REQUIRED_FIELDS}
        any_readable = False
        for raw in read_files(self.files, self.format, list(self.columns.values())):
            any_readable = any_readable or raw.fault is None
            absent_columns = {f: c for f, c in absent_columns.items() if c not in raw.values}
            yield map_columns(raw, self.columns, optional_may_lack=True)
        if any_readable and absent_columns:
            field, column = next(iter(absent_columns.items()))
            raise ValueError(
                f"data.source.columns.{field}={column!r}: no row of {self.files} has this column; "
                f"name one that is there, or set data.source.columns.{field}=null"
            )

    def describe(self) -> dict[str, Any]:
        """Return what identifies the data, including a `fingerprint`, for the manifest."""
        return {
            "kind": "TableFiles",
            "files": [str(path) for path in expand_files(self.files)],
            "columns": self.columns,
            "fingerprint": content_hash(
                fingerprint_files(self.files), json.dumps(self.columns, sort_keys=True)
            ),
        }


def expand_files(files: str | Sequence[str]) -> list[Path]:
    """Return the files that paths and glob patterns match, each of them once.

    Raises:
        FileNotFoundError: a path or pattern matches nothing.
        ValueError: `files` is empty, or a path is a folder.
    """
    patterns = [files] if isinstance(files, str) else list(files)
    if not patterns:
        raise ValueError("data.source.files is empty; give a path, a glob pattern or a list")
    existing: list[Path] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            raise ValueError(
                f"{pattern} is a folder; name its files, for example '{pattern}/*.jsonl'"
            )
        matches = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path))))
        existing += [match for match in matches if match.is_file()]
        if not matches:
            raise FileNotFoundError(missing_path(path))
    return list(dict.fromkeys(existing))


def missing_path(path: Path) -> str:
    """Return an error message for a path that does not exist, with the most similar name."""
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
    """Return a hash over the contents of the files in their order, without their names."""
    digests = []
    for path in expand_files(files):
        with path.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return content_hash(*digests)


def read_files(
    files: str | Sequence[str], format: str | None, columns: Sequence[str]
) -> Iterator[RawRow]:
    """Yield the rows of all files, with values by column name.

    Args:
        files: see `TableFiles`.
        format: see `TableFiles`.
        columns: the columns that are read from Parquet files. Other formats are read as a whole.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the ending of a file is unknown, or the file as a whole cannot be read.
    """
    for path in expand_files(files):
        kind = format or FORMATS.get(path.suffix.lower())
        if kind is None:
            raise ValueError(
                f"{path}: the ending {path.suffix!r} is none of {', '.join(FORMATS)}; "
                "name its format with data.source.format=jsonl|csv|parquet"
            )
        if kind == "jsonl":
            yield from read_jsonl(path)
        elif kind == "csv":
            yield from read_csv(path)
        else:
            yield from read_parquet(path, columns)


def read_jsonl(path: Path) -> Iterator[RawRow]:
    """Yield one row for each line, which holds a JSON object. Blank lines are skipped.

    The number of a row is the number of its line.
    """
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
    """Yield the rows below the header line.

    Bytes that are not valid UTF-8 become surrogates, which the check of the row refuses later.

    Raises:
        ValueError: the file is empty, or column names repeat.
    """
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
    """Yield all rows with the named columns, or with all columns if the file has none of them.

    Raises:
        ValueError: it is not a Parquet file.
    """
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            read_columns = [name for name in names if name in columns] or names
            number = 0
            for batch in file.iter_batches(batch_size=ROWS_PER_BATCH, columns=read_columns):
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
            f"{did_you_mean(format, known)}, or null to decide by the file's ending"
        )
    return format
