"""Checks raw rows and turns them into `Problem`s. A broken row is reported by file and row.

Nothing here loads a model: the caller passes a function that counts tokens, and the tags of the
prompt style as forbidden strings. Text is kept exactly as the source has it.

Every stage that reads problems uses this module. The paper has no counterpart.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rlt.config.suggestions import did_you_mean
from rlt.data.problem import Problem, make_problem
from rlt.data.rows import (
    EMPTY_QUESTION,
    EMPTY_SOLUTION,
    MISSING_COLUMN,
    REQUIRED_FIELDS,
    TAG_IN_TEXT,
    TEXT_FIELDS,
    TOO_LONG,
    UNDECODABLE,
    WRONG_TYPE,
    BadRow,
    BadRowsError,
    ProblemSet,
    RawRow,
    RowError,
    excerpt,
)


def check_columns(columns: Mapping[str, str | None]) -> dict[str, str]:
    """Return the mapping from field to column without the fields that have no column.

    Raises:
        ValueError: a field is unknown, or question or solution has no column.
    """
    for field in columns:
        if field not in TEXT_FIELDS:
            raise ValueError(
                f"columns has the field {field!r}; a field must be one of {', '.join(TEXT_FIELDS)}"
                f"{did_you_mean(str(field), TEXT_FIELDS)}"
            )
    mapped = {field: column for field, column in columns.items() if column is not None}
    missing = [field for field in REQUIRED_FIELDS if field not in mapped]
    if missing:
        raise ValueError(
            f"columns={dict(columns)} names no column for {' and '.join(missing)}; "
            f"add for example data.source.columns.{missing[0]}=<column>"
        )
    return mapped


def map_columns(raw: RawRow, columns: Mapping[str, str], optional_may_lack: bool) -> RawRow:
    """Rename the columns of a row to fields. A missing column becomes the fault of the row.

    Args:
        raw: a row with values by column name.
        columns: column of each field.
        optional_may_lack: whether a row may lack the columns of explanation and system, as in
            JSONL files.
    """
    if raw.fault is not None:
        return raw
    values: dict[str, Any] = {}
    for field, column in columns.items():
        if column in raw.values:
            values[field] = raw.values[column]
        elif field in REQUIRED_FIELDS or not optional_may_lack:
            row_columns = ", ".join(map(str, raw.values))
            detail = f"no {column!r} (for {field}) among: {row_columns}"
            fault = RowError(MISSING_COLUMN, detail + did_you_mean(column, map(str, raw.values)))
            return RawRow(raw.file, raw.row, {}, fault, raw.line)
    return RawRow(raw.file, raw.row, values, None, raw.line)


def to_problem(
    raw: RawRow,
    forbidden: Sequence[str] = (),
    count_tokens: Callable[[str], int] | None = None,
    max_tokens: int | None = None,
) -> Problem:
    """Check one row and build its `Problem`.

    Args:
        raw: a row with values by field name.
        forbidden: strings that no text except the system prompt may contain.
        count_tokens: returns the number of tokens of a text; needed for `max_tokens`.
        max_tokens: largest number of tokens of all texts of the row; None is no limit.

    Raises:
        RowError: the row cannot be used. The error names the first fault.
    """
    if raw.fault is not None:
        raise raw.fault
    for field in REQUIRED_FIELDS:
        if field not in raw.values:
            raise RowError(MISSING_COLUMN, f"no {field}")
    question = _text(raw.values["question"], "question")
    solution = _text(_number_as_text(raw.values["solution"]), "solution")
    explanation = _text(raw.values.get("explanation"), "explanation")
    system = _text(raw.values.get("system"), "system")
    if question is None or not question.strip():
        raise RowError(EMPTY_QUESTION, f"question is {raw.values['question']!r}")
    if solution is None or not solution.strip():
        raise RowError(EMPTY_SOLUTION, f"solution is {raw.values['solution']!r}")
    texts = {"question": question, "solution": solution, "explanation": explanation or ""}
    for field, text in texts.items():  # not the system prompt, which may explain the tags
        for tag in forbidden:
            if tag in text:
                raise RowError(TAG_IN_TEXT, f"{field} holds {tag!r} at character {text.find(tag)}")
    if max_tokens is not None and count_tokens is not None:
        texts["system"] = system or ""
        counts = {field: count_tokens(text) for field, text in texts.items() if text}
        if sum(counts.values()) > max_tokens:
            parts = ", ".join(f"{field} {n}" for field, n in counts.items())
            raise RowError(TOO_LONG, f"{sum(counts.values())} tokens > {max_tokens} ({parts})")
    return make_problem(question, solution, explanation, system, raw.values.get("metadata"))


def collect_problems(
    rows: Iterable[RawRow],
    on_bad_row: str = "stop",
    forbidden: Sequence[str] = (),
    count_tokens: Callable[[str], int] | None = None,
    max_tokens: int | None = None,
    unique: bool = True,
) -> ProblemSet:
    """Check all rows and build their problems.

    Args:
        rows: rows with values by field name.
        on_bad_row: `stop` or `skip`. With `stop`, broken rows raise an error after all rows have
            been read, so that the error counts all of them.
        forbidden: see `to_problem`.
        count_tokens: see `to_problem`.
        max_tokens: see `to_problem`.
        unique: keep only the first of several rows with the same problem.

    Raises:
        BadRowsError: there are broken rows, and `on_bad_row` is `stop`.
        ValueError: an option is out of range, or `max_tokens` is set without `count_tokens`.
    """
    if on_bad_row not in ("stop", "skip"):
        raise ValueError(f"data.on_bad_row={on_bad_row!r}; it must be 'stop' or 'skip'")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(
            f"data.max_tokens={max_tokens}; it must be at least 1, or null for no limit"
        )
    if max_tokens is not None and count_tokens is None:
        raise ValueError(
            f"data.max_tokens={max_tokens} cannot be checked without a tokenizer that "
            "counts tokens; set data.max_tokens=null"
        )
    problems: list[Problem] = []
    bad_rows: list[BadRow] = []
    known_ids: set[str] = set()
    read = duplicates = 0
    for raw in rows:
        read += 1
        try:
            problem = to_problem(raw, forbidden, count_tokens, max_tokens)
        except RowError as fault:
            bad_rows.append(BadRow(raw.file, raw.row, fault.reason, fault.detail, raw.line))
            continue
        if unique and problem.id in known_ids:
            duplicates += 1
            continue
        known_ids.add(problem.id)
        problems.append(problem)
    if bad_rows and on_bad_row == "stop":
        raise BadRowsError(bad_rows, read)
    return ProblemSet(problems, bad_rows, read, duplicates)


def _number_as_text(value: Any) -> Any:
    """Turn a number into its text (42.0 into "42") and NaN into None. Leave other values alone.

    Truth values are left alone too, although Python counts them as integers.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if math.isfinite(value):
            return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
    return value


def _text(value: Any, field: str) -> str | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str):
        raise RowError(
            WRONG_TYPE, f"{field} is a {type(value).__name__}, not text: {excerpt(value)}"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        position = f"character {error.start}"
        raise RowError(UNDECODABLE, f"{field} is not valid Unicode at {position}") from error
    return value
