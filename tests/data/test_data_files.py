"""JSONL, CSV and Parquet files written by hand, intact and broken."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlt.data.row_checks import collect_problems
from rlt.data.rows import BadRowsError
from rlt.data.sources.files import TableFiles, expand_files

COLUMNS = {"question": "q", "solution": "a", "explanation": None, "system": None}
WITH_COT = {**COLUMNS, "explanation": "cot"}


def test_jsonl_rows_whole_and_broken(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [
        b'\xef\xbb\xbf{"q": "eins", "a": "1"}',  # byte order mark
        b"",
        '{"q": "größer \\ud83d\\ude00", "a": 2, "other": null}'.encode(),
        b'{"q": "three", "a": "3"',
        b'{"q": "\xff", "a": "4"}',
        b'["q", "a"]',
        b'{"q": "seven"}',
        b'{"q": "eight", "a": NaN}',
        b'{"q": "nine", "a": [9]}',
        b'{"q": "<t>", "a": "10"}',
        '{"q": "line\u2028separator", "a": "11"}'.encode(),
    ]
    path.write_bytes(b"\n".join(lines))
    actual = collect_problems(TableFiles(str(path), COLUMNS).rows(), "skip", ["<t>"])
    assert [(p.question, p.solution) for p in actual.problems] == [
        ("eins", "1"),
        ("größer 😀", "2"),
        ("line\u2028separator", "11"),
    ]
    assert [(bad.row, bad.reason) for bad in actual.bad_rows] == [
        (4, "undecodable"),
        (5, "undecodable"),
        (6, "wrong type"),
        (7, "missing column"),
        (8, "empty solution"),
        (9, "wrong type"),
        (10, "tag inside the text"),
    ]
    assert {bad.file for bad in actual.bad_rows} == {str(path)}
    with pytest.raises(BadRowsError, match="row 4: undecodable"):
        collect_problems(TableFiles(str(path), COLUMNS).rows())


def test_csv_values_are_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    long = "x" * 200_000  # over the csv module's own limit
    path.write_text(
        f'q,a,cot\n"two\nlines, one cell",007,\nleer,,so\n\nshort,1\n"{long}",1e3,"say ""x"""\n',
        encoding="utf-8",
    )
    actual = collect_problems(TableFiles(str(path), WITH_COT).rows(), "skip")
    assert [(p.question, p.solution, p.explanation) for p in actual.problems] == [
        ("two\nlines, one cell", "007", None),
        (long, "1e3", 'say "x"'),
    ]
    assert [(bad.row, bad.line, bad.reason) for bad in actual.bad_rows] == [
        (2, 4, "empty solution"),
        (3, 6, "wrong type"),
    ]
    assert "row 2 (line 4): empty solution" in str(actual.bad_rows[0])


def test_csv_broken_bytes_and_quotes(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'q,a\n\xff,1\n"b"x,2\nc,3\n')
    actual = collect_problems(TableFiles(str(path), COLUMNS).rows(), "skip")
    assert [p.question for p in actual.problems] == ["c"]
    assert [(bad.row, bad.reason) for bad in actual.bad_rows] == [
        (1, "undecodable"),
        (2, "undecodable"),
    ]


@pytest.mark.parametrize(("text", "error"), [("", "is empty"), ("q,q\n1,2\n", "repeat")])
def test_csv_header(tmp_path: Path, text: str, error: str) -> None:
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(ValueError, match=error):
        list(TableFiles(str(tmp_path / "rows.csv"), COLUMNS).rows())


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = {"q": ["eins", "zwei", None], "a": [1.0, None, 3.0], "cot": ["", None, "x"]}
    pq.write_table(pa.table(table), path)
    actual = collect_problems(TableFiles(str(path), WITH_COT).rows(), "skip")
    assert [(p.question, p.solution, p.explanation) for p in actual.problems] == [("eins", "1", "")]
    assert [(bad.row, bad.reason) for bad in actual.bad_rows] == [
        (2, "empty solution"),
        (3, "empty question"),
    ]
    pq.write_table(pa.table({"q": ["eins"], "ans": [[1]]}), path)
    actual = collect_problems(TableFiles(str(path), COLUMNS).rows(), "skip")
    assert [bad.reason for bad in actual.bad_rows] == ["missing column"]
    lists = TableFiles(str(path), {**COLUMNS, "solution": "ans"})
    assert [bad.reason for bad in collect_problems(lists.rows(), "skip").bad_rows] == ["wrong type"]
    path.write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        list(TableFiles(str(path), COLUMNS).rows())


def test_glob_list_and_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"q": name, "a": name}) + "\n")
    (tmp_path / "d.csv").write_text("q,a\nd,d\n")
    source = TableFiles(
        [str(tmp_path / "d.csv"), str(tmp_path / "*.jsonl"), str(tmp_path / "a.jsonl")], COLUMNS
    )
    problems = collect_problems(source.rows()).problems
    assert [problem.question for problem in problems] == ["d", "a", "b", "c"]


def test_fingerprint_follows_the_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text('{"q": "1", "a": "1"}')
    second.write_text('{"q": "1", "a": "1"}')

    def fingerprint(path: Path, **columns: str) -> str:
        return str(TableFiles(str(path), {**COLUMNS, **columns}).describe()["fingerprint"])

    assert fingerprint(first) == fingerprint(second) != fingerprint(first, solution="q")
    second.write_text('{"q": "1", "a": "2"}')
    assert fingerprint(first) != fingerprint(second)


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(FileNotFoundError, match=r"no 'trian\.jsonl'; did you mean 'train\.jsonl'"):
        expand_files(str(tmp_path / "trian.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"has no 'nodir'"):
        expand_files(str(tmp_path / "nodir" / "deep" / "*.csv"))
    with pytest.raises(ValueError, match="is a folder"):
        expand_files(str(tmp_path))
    with pytest.raises(ValueError, match="is empty"):
        expand_files([])


def test_missing_relative_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no 'dta'; did you mean 'data'"):
        expand_files("dta/x.jsonl")


def test_format(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text('{"q": "1", "a": "1"}')
    with pytest.raises(ValueError, match=r"'\.txt' is none of"):
        list(TableFiles(str(path), COLUMNS).rows())
    assert len(list(TableFiles(str(path), COLUMNS, format="jsonl").rows())) == 1
    with pytest.raises(ValueError, match="did you mean 'parquet'"):
        TableFiles(str(path), COLUMNS, format="parqet")


def test_optional_column_that_no_row_has(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"q": "1", "a": "1"}\n{"q": "2", "a": "2", "cot": "x"}\n')
    problems = collect_problems(TableFiles(str(path), WITH_COT).rows()).problems
    assert [problem.explanation for problem in problems] == [None, "x"]
    with pytest.raises(ValueError, match=r"columns\.system='sys': no row"):
        list(TableFiles(str(path), {**COLUMNS, "system": "sys"}).rows())
