"""From raw rows to `Problem`s: every row is checked, and a broken one is named by file and row.

A source yields `RawRow`s whose `values` are keyed by field (question, solution, explanation,
system, metadata). Nothing here loads a model: the length limit is checked with a `count_tokens`
callable, the forbidden tags are those of the prompt style. Text is kept exactly as it was given.
The paper has no counterpart; used by every stage that reads problems (`rlt stage=teacher_rl …`).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlt.config.suggestions import did_you_mean
from rlt.data.problem import Problem, make_problem

TEXT_FIELDS = ("question", "solution", "explanation", "system")
REQUIRED_FIELDS = ("question", "solution")
SHOWN_ROWS = 5

MISSING_COLUMN = "missing column"
EMPTY_QUESTION = "empty question"
EMPTY_SOLUTION = "empty solution"
WRONG_TYPE = "wrong type"
TAG_IN_TEXT = "tag inside the text"
TOO_LONG = "over the length limit"
UNDECODABLE = "undecodable"
MISSING_TAGS = "missing tags"


class RowError(ValueError):
    """Why one row cannot be used: a reason that is counted, and what exactly was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class RawRow:
    """One row as its source found it.

    Attributes:
        file: where it stands, as shown to the user.
        row: number within the file, from 1 (JSONL: line number; CSV: header not counted).
        values: values by field name, or by column name before `map_columns`.
        fault: set by a source that could not read the row at all.
        line: line in the file where the row ends, if that differs from `row`.
    """

    file: str
    row: int
    values: Mapping[str, Any]
    fault: RowError | None = None
    line: int | None = None


@dataclass(frozen=True)
class BadRow:
    file: str
    row: int
    reason: str
    detail: str
    line: int | None = None

    def __str__(self) -> str:
        line = "" if self.line is None else f" (line {self.line})"
        return f"{self.file}, row {self.row}{line}: {self.reason}: {self.detail}"


@dataclass(frozen=True)
class ProblemSet:
    problems: list[Problem]
    bad_rows: list[BadRow]
    read: int
    duplicates_dropped: int

    def bad_per_reason(self) -> dict[str, int]:
        return count_reasons(self.bad_rows)


class Source(Protocol):
    """What the `source:` node of a data config is instantiated to."""

    def rows(self) -> Iterator[RawRow]: ...

    def describe(self) -> dict[str, Any]: ...


class BadRowsError(ValueError):
    """Broken rows under `on_bad_row=stop`; the message shows the first and counts them all."""

    def __init__(self, bad_rows: Sequence[BadRow], read: int) -> None:
        self.bad_rows = list(bad_rows)
        lines = [f"{len(bad_rows)} of {read} rows cannot be used:"]
        lines += [f"  {bad}" for bad in bad_rows[:SHOWN_ROWS]]
        if len(bad_rows) > SHOWN_ROWS:
            lines.append(f"  … and {len(bad_rows) - SHOWN_ROWS} more")
        counts = ", ".join(f"{reason}: {n}" for reason, n in count_reasons(bad_rows).items())
        lines.append(f"Rows per reason: {counts}.")
        lines.append("Repair them, or skip and count them with data.on_bad_row=skip.")
        super().__init__("\n".join(lines))


def count_reasons(bad_rows: Iterable[BadRow]) -> dict[str, int]:
    """Number of rows per reason, most frequent first."""
    return dict(Counter(bad.reason for bad in bad_rows).most_common())


def check_columns(columns: Mapping[str, str | None]) -> dict[str, str]:
    """The mapping field -> column without the unmapped fields; unknown fields are errors."""
    for field in columns:
        if field not in TEXT_FIELDS:
            raise ValueError(
                f"columns has the field {field!r}; it must be one of {', '.join(TEXT_FIELDS)}"
                f"{did_you_mean(str(field), TEXT_FIELDS)}"
            )
    mapped = {field: column for field, column in columns.items() if column is not None}
    missing = [field for field in REQUIRED_FIELDS if field not in mapped]
    if missing:
        raise ValueError(
            f"columns={dict(columns)} names no column for {' and '.join(missing)}; "
            f"add e.g. data.source.columns.{missing[0]}=<column>"
        )
    return mapped


def map_columns(raw: RawRow, columns: Mapping[str, str], optional_may_lack: bool) -> RawRow:
    """Rename columns to fields; a column that the row lacks becomes its fault.

    With `optional_may_lack`, rows may leave out the columns of explanation and system (JSONL).
    """
    if raw.fault is not None:
        return raw
    values: dict[str, Any] = {}
    for field, column in columns.items():
        if column in raw.values:
            values[field] = raw.values[column]
        elif field in REQUIRED_FIELDS or not optional_may_lack:
            here = ", ".join(map(str, raw.values))
            detail = f"no {column!r} (for {field}) among: {here}"
            fault = RowError(MISSING_COLUMN, detail + did_you_mean(column, map(str, raw.values)))
            return RawRow(raw.file, raw.row, {}, fault, raw.line)
    return RawRow(raw.file, raw.row, values, None, raw.line)


def to_problem(
    raw: RawRow,
    forbidden: Sequence[str] = (),
    count_tokens: Callable[[str], int] | None = None,
    max_tokens: int | None = None,
) -> Problem:
    """Check one row and build its `Problem`; raises `RowError` with the first thing wrong."""
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
    for field, text in texts.items():  # a system prompt may well explain the tags
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
    """Check all rows; with `stop`, one bad row raises after all were read, so that all count.

    With `unique`, the first of several rows of the same problem is kept.
    """
    if on_bad_row not in ("stop", "skip"):
        raise ValueError(f"data.on_bad_row={on_bad_row!r}; it must be 'stop' or 'skip'")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"data.max_tokens={max_tokens}; it must be at least 1, or null: no limit")
    if max_tokens is not None and count_tokens is None:
        raise ValueError(
            f"data.max_tokens={max_tokens} cannot be checked: no tokenizer was given to count "
            "with; set data.max_tokens=null"
        )
    problems: list[Problem] = []
    bad_rows: list[BadRow] = []
    seen: set[str] = set()
    read = duplicates = 0
    for raw in rows:
        read += 1
        try:
            problem = to_problem(raw, forbidden, count_tokens, max_tokens)
        except RowError as fault:
            bad_rows.append(BadRow(raw.file, raw.row, fault.reason, fault.detail, raw.line))
            continue
        if unique and problem.id in seen:
            duplicates += 1
            continue
        seen.add(problem.id)
        problems.append(problem)
    if bad_rows and on_bad_row == "stop":
        raise BadRowsError(bad_rows, read)
    return ProblemSet(problems, bad_rows, read, duplicates)


def excerpt(value: object, limit: int = 60) -> str:
    shown = repr(value)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def _number_as_text(value: Any) -> Any:
    """Numbers stand for their text, 42.0 for 42; NaN is an empty value; a truth value is not."""
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
