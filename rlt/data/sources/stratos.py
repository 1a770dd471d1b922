"""Problems in the conversation format of Bespoke-Stratos-17k, the data of the paper.

A row has a `system` prompt and `conversations`, which is a list of {from, value}. The user's turn
is the question. The assistant's turn holds a tagged thought, which becomes the explanation, and a
tagged solution.

Used by `rlt stage=teacher_sft data=bespoke_stratos`, and without a hub by `data=stratos_files`.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from rlt.data.problem import content_hash
from rlt.data.rows import (
    MISSING_COLUMN,
    MISSING_TAGS,
    TAG_IN_TEXT,
    WRONG_TYPE,
    RawRow,
    RowError,
    excerpt,
)
from rlt.data.sources.files import expand_files, fingerprint_files, read_files
from rlt.data.sources.hub import HubTable

COLUMNS = ("system", "conversations")
TAGS = tuple(
    f"<|{side}_of_{block}|>" for block in ("thought", "solution") for side in ("begin", "end")
)
ANSWER_FORM = re.compile(
    r"\s*<\|begin_of_thought\|>(?P<thought>.*?)<\|end_of_thought\|>"
    r"\s*<\|begin_of_solution\|>(?P<solution>.*?)<\|end_of_solution\|>\s*",
    re.DOTALL,
)


class StratosConversations:
    """A source of problems in Stratos conversations. Either `path` or `files` is set.

    Args:
        path: hub id or local folder of a data set.
        split: name of the split of `path`.
        files: a JSONL or Parquet file, a glob pattern, or a list of them.
        revision: branch, tag or commit on the hub; None is the newest.

    Raises:
        ValueError: both or neither of `path` and `files` are set.
    """

    def __init__(
        self,
        path: str | None = None,
        split: str = "train",
        files: str | Sequence[str] | None = None,
        revision: str | None = None,
    ) -> None:
        if (path is None) == (files is None):
            raise ValueError(
                f"data.source.path={path!r} and data.source.files={files!r}; set exactly one"
            )
        self.files = files
        self.table = None if path is None else HubTable(path, split, None, revision)

    def rows(self) -> Iterator[RawRow]:
        """Yield all conversations as problems."""
        for raw in self._raw_rows():
            if raw.fault is not None:
                yield raw
                continue
            try:
                yield RawRow(raw.file, raw.row, parse_conversation(raw.values))
            except RowError as fault:
                yield RawRow(raw.file, raw.row, {}, fault)

    def _raw_rows(self) -> Iterator[RawRow]:
        if self.table is not None:
            return self.table.rows(list(COLUMNS))
        assert self.files is not None
        return read_files(self.files, None, COLUMNS)

    def describe(self) -> dict[str, Any]:
        """Return what identifies the data, including a `fingerprint`, for the manifest."""
        if self.table is not None:
            about = self.table.describe()
        else:
            assert self.files is not None
            paths = [str(path) for path in expand_files(self.files)]
            about = {"files": paths, "fingerprint": fingerprint_files(self.files)}
        fingerprint = content_hash("stratos", about["fingerprint"])
        return {"kind": "StratosConversations", **about, "fingerprint": fingerprint}


def parse_conversation(values: Any) -> dict[str, Any]:
    """Return the fields of one row, which has the columns `COLUMNS`.

    Raises:
        RowError: the row is not one question with one tagged answer.
    """
    if "conversations" not in values:
        raise RowError(MISSING_COLUMN, f"no 'conversations' among: {', '.join(values)}")
    turns = values["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        what = f"conversations is not a list of {{from, value}}: {excerpt(turns)}"
        raise RowError(WRONG_TYPE, what)
    speakers = [turn.get("from") for turn in turns]
    if speakers not in (["user", "assistant"], ["human", "gpt"]):
        what = f"conversations has the turns {speakers}, not ['user', 'assistant']"
        raise RowError(WRONG_TYPE, what)
    question, answer = (turn.get("value") for turn in turns)
    if not isinstance(answer, str):
        raise RowError(WRONG_TYPE, f"the assistant's turn is not text: {excerpt(answer)}")
    match = ANSWER_FORM.fullmatch(answer)
    if match is None:
        raise RowError(
            MISSING_TAGS,
            "the assistant's turn is not <|begin_of_thought|>…<|end_of_thought|> "
            f"<|begin_of_solution|>…<|end_of_solution|>: {excerpt(answer)}",
        )
    for block in ("thought", "solution"):
        for tag in TAGS:
            if tag in match[block]:
                raise RowError(TAG_IN_TEXT, f"the {block} block holds {tag!r}")
    return {
        "question": question,
        "solution": match["solution"].strip(),
        "explanation": match["thought"].strip(),
        "system": values.get("system"),
    }
