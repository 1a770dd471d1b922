"""Sources of benchmarks whose rows need more than a column mapping.

gsm8k, MATH-500 and AIME are `rlt.data.sources.hub.HubDataset`s. GPQA needs more, because the four
choices become part of the question in random order. `path` may be a local folder of files with the
same columns, which has no named configurations: `rlt stage=evaluate benchmark=gpqa_diamond
benchmark.data.source.path=my/gpqa benchmark.data.source.name=null …`.
"""

import random
from collections.abc import Iterator
from typing import Any

from rlt.config.suggestions import did_you_mean
from rlt.data.problem import content_hash
from rlt.data.rows import (
    EMPTY_QUESTION,
    EMPTY_SOLUTION,
    MISSING_COLUMN,
    WRONG_TYPE,
    RawRow,
    RowError,
)
from rlt.data.sources.hub import HubTable

_QUESTION = "Question"
_CHOICES = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
_LETTERS = "ABCD"


class Gpqa:
    """GPQA as multiple choice, whose solution is the letter of the right choice.

    The order of the choices depends on the question's text and `seed` alone. Every run and every
    model therefore sees the same order, whatever the order and number of the rows.

    Args:
        path: the data set's id on the hub, or a local folder.
        name: the configuration of the data set, or None for a local folder.
        split: the split that is read.
        revision: the revision on the hub, or None for the newest.
        seed: changes the order of the choices.
    """

    def __init__(
        self,
        path: str = "Idavidrein/gpqa",
        name: str | None = "gpqa_diamond",
        split: str = "train",
        revision: str | None = None,
        seed: int = 0,
    ) -> None:
        self.table = HubTable(path, split, name, revision)
        self.seed = seed

    def rows(self) -> Iterator[RawRow]:
        """Yield the rows with question, solution and choices; a broken row carries its fault."""
        for raw in self.table.rows([_QUESTION, *_CHOICES]):
            yield raw if raw.fault is not None else self._lettered(raw)

    def describe(self) -> dict[str, Any]:
        """Return what a manifest says of the source, with a fingerprint of table and seed."""
        about = self.table.describe()
        fingerprint = content_hash(about["fingerprint"], f"gpqa {self.seed}")
        return {"kind": "Gpqa", **about, "seed": self.seed, "fingerprint": fingerprint}

    def _lettered(self, raw: RawRow) -> RawRow:
        for column in (_QUESTION, *_CHOICES):
            fault = _fault(raw, column)
            if fault is not None:
                return RawRow(raw.file, raw.row, {}, fault, raw.line)
        question = raw.values[_QUESTION].strip()
        order = list(range(len(_CHOICES)))
        random.Random(f"{self.seed} {content_hash(question)}").shuffle(order)
        choices = {
            letter: raw.values[_CHOICES[index]].strip()
            for letter, index in zip(_LETTERS, order, strict=True)
        }
        listed = "\n".join(f"{letter}) {text}" for letter, text in choices.items())
        values = {
            "question": f"{question}\n\n{listed}\n\nAnswer with the letter of the right choice.",
            "solution": _LETTERS[order.index(0)],
            "metadata": {"choices": choices},
        }
        return RawRow(raw.file, raw.row, values, None, raw.line)


def _fault(raw: RawRow, column: str) -> RowError | None:
    if column not in raw.values:
        here = ", ".join(map(str, raw.values))
        hint = did_you_mean(column, map(str, raw.values))
        return RowError(MISSING_COLUMN, f"no {column!r} among: {here}{hint}")
    value = raw.values[column]
    if not isinstance(value, str):
        return RowError(WRONG_TYPE, f"{column!r} is a {type(value).__name__}, not text")
    if not value.strip():
        reason = EMPTY_QUESTION if column == _QUESTION else EMPTY_SOLUTION
        return RowError(reason, f"{column!r} is empty")
    return None
