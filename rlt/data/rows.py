"""Raw rows, the reasons why rows cannot be used, and the result of checking all rows of a source.

A source yields `RawRow`s whose `values` are keyed by field (question, solution, explanation,
system, metadata). `rlt.data.row_checks` turns them into `Problem`s.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlt.data.problem import Problem

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
    """A row cannot be used.

    Args:
        reason: a short reason, by which broken rows are counted.
        detail: what exactly is wrong with the row.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class RawRow:
    """One row as its source has read it.

    Attributes:
        file: the file or data set of the row, as shown to the user.
        row: number of the row in the file, from 1. For JSONL it is the line number; for CSV the
            header is not counted.
        values: values by field name, or by column name before `map_columns`.
        fault: why the source could not read the row; None if it could.
        line: number of the line in the file where the row ends, if that differs from `row`.
    """

    file: str
    row: int
    values: Mapping[str, Any]
    fault: RowError | None = None
    line: int | None = None


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used.

    Attributes:
        file: the file or data set of the row.
        row: number of the row in the file, from 1.
        reason: a short reason, by which broken rows are counted.
        detail: what exactly is wrong with the row.
        line: number of the line in the file where the row ends, if that differs from `row`.
    """

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
    """The result of checking all rows of a source.

    Attributes:
        problems: the problems, in the order of their rows.
        bad_rows: the rows that cannot be used.
        read: number of rows that were read.
        duplicates_dropped: number of rows that repeat an earlier problem.
    """

    problems: list[Problem]
    bad_rows: list[BadRow]
    read: int
    duplicates_dropped: int

    def bad_per_reason(self) -> dict[str, int]:
        """Return the number of bad rows for each reason, most frequent first."""
        return count_reasons(self.bad_rows)


class Source(Protocol):
    """A source of problems, which the `source:` node of a data config names."""

    def rows(self) -> Iterator[RawRow]:
        """Yield all rows, with values by field name."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what identifies the source's data, including a `fingerprint`, for the manifest."""
        ...


class BadRowsError(ValueError):
    """There are broken rows under `on_bad_row=stop`.

    The message shows the first of them and counts all of them by reason.

    Args:
        bad_rows: the broken rows.
        read: number of rows that were read.
    """

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
    """Return the number of rows for each reason, most frequent first."""
    return dict(Counter(bad.reason for bad in bad_rows).most_common())


def excerpt(value: object, limit: int = 60) -> str:
    """Return the repr of a value for a message, cut to at most `limit` characters."""
    shown = repr(value)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
