"""Trace files."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlt.data.traces import find_traces, trace_source, write_traces

ROWS: list[dict[str, Any]] = [
    {"question": "1+1?", "solution": "2", "explanation": "One more: é.\n", "system": None,
     "reward": -0.5, "reward_terms": {"kl/mean": 0.25}, "finish": "stop"},
    {"question": "2+2?", "solution": "4", "explanation": "Twice \"two\".", "system": "Think.",
     "reward": 1.0, "reward_terms": {"kl/mean": 0.5}, "finish": "eos"},
]  # fmt: skip


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_written_traces_are_read_as_a_source(format: str, tmp_path: Path) -> None:
    path = write_traces(ROWS, tmp_path, format)
    assert path == tmp_path / f"traces.{format}"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # no temporary file is left
    for name in (path, tmp_path / "traces", tmp_path):
        assert find_traces(str(name)) == path
    rows = list(trace_source(str(tmp_path / "traces")).rows())
    names = ("question", "solution", "explanation", "system")
    actual = [{name: row.values.get(name) for name in names} for row in rows]
    assert actual == [{name: row[name] for name in names} for row in ROWS]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_traces_without_any_system_prompt(format: str, tmp_path: Path) -> None:
    for columns in (
        ("question", "solution", "explanation"),
        ("question", "solution", "explanation", "system"),
    ):
        rows = [
            {name: row[name] for name in columns}
            | ({"system": None} if "system" in columns else {})
            for row in ROWS
        ]
        path = write_traces(rows, tmp_path, format)
        [one, other] = trace_source(str(path)).rows()
        assert (one.values["explanation"], one.values.get("system")) == ("One more: é.\n", None)
        assert other.values["question"] == "2+2?"


def test_jsonl_keeps_every_value(tmp_path: Path) -> None:
    path = write_traces(ROWS, tmp_path, "jsonl")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == ROWS
    assert "é" in lines[0]


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format='csv': choose jsonl or parquet"):
        write_traces(ROWS, tmp_path, "csv")
    assert not list(tmp_path.iterdir())


def test_a_path_without_traces_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="give <run>/traces of a collect run"):
        find_traces(str(tmp_path / "traces"))
