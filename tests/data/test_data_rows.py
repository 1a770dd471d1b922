"""Rows that are broken in each possible way."""

import math

import pytest

from rlt.data.problem import problem_id
from rlt.data.row_checks import check_columns, collect_problems, map_columns, to_problem
from rlt.data.rows import BadRowsError, RawRow, RowError


def raw(row: int = 1, /, **values: object) -> RawRow:
    return RawRow("a.jsonl", row, {"question": "2+2?", "solution": "4", **values})


def reason(row: RawRow, **limits: object) -> str:
    with pytest.raises(RowError) as caught:
        to_problem(row, **limits)  # type: ignore[arg-type]
    return caught.value.reason


def test_whole_row_is_kept_exactly() -> None:
    problem = to_problem(
        raw(question=" Wie groß ist 数? \n", explanation="", system="s", metadata={"task": "x"})
    )
    assert problem.question == " Wie groß ist 数? \n"
    assert problem.id == problem_id(" Wie groß ist 数? \n", "4")
    assert (problem.solution, problem.explanation, problem.system) == ("4", "", "s")
    assert problem.metadata == {"task": "x"}


def test_no_explanation_differs_from_an_empty_one() -> None:
    assert to_problem(raw()).explanation is None
    assert to_problem(raw(explanation=None)).explanation is None
    assert to_problem(raw(explanation="")).explanation == ""


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"question": "  \n"}, "empty question"),
        ({"question": None}, "empty question"),
        ({"question": 7}, "wrong type"),
        ({"solution": ""}, "empty solution"),
        ({"solution": None}, "empty solution"),
        ({"solution": math.nan}, "empty solution"),
        ({"solution": math.inf}, "wrong type"),
        ({"solution": True}, "wrong type"),
        ({"solution": ["4"]}, "wrong type"),
        ({"solution": {"value": 4}}, "wrong type"),
        ({"explanation": 3}, "wrong type"),
        ({"system": ["a"]}, "wrong type"),
        ({"explanation": "so </think> it is"}, "tag inside the text"),
        ({"question": "<think>?"}, "tag inside the text"),
        ({"solution": "\ud800"}, "undecodable"),
    ],
)
def test_reasons(values: dict[str, object], expected: str) -> None:
    assert reason(raw(**values), forbidden=["<think>", "</think>"]) == expected


def test_missing_solution() -> None:
    assert reason(RawRow("a", 1, {"question": "?"})) == "missing column"


def test_system_prompt_may_hold_tags() -> None:
    assert to_problem(raw(system="Use <think>."), ["<think>"]).system == "Use <think>."


@pytest.mark.parametrize(
    ("value", "text"), [(4, "4"), (-4, "-4"), (4.0, "4"), (0.5, "0.5"), (1e300, "1e+300")]
)
def test_numbers_as_solutions(value: float, text: str) -> None:
    assert to_problem(raw(solution=value)).solution == text


def test_length_limit_counts_all_texts() -> None:
    row = raw(question="a b", solution="c", explanation="d e", system="f")  # 6 words

    def words(text: str) -> int:
        return len(text.split())

    assert to_problem(row, count_tokens=words, max_tokens=6).question == "a b"
    with pytest.raises(RowError) as caught:
        to_problem(row, count_tokens=words, max_tokens=5)
    assert caught.value.reason == "over the length limit"
    assert caught.value.detail == "6 tokens > 5 (question 2, solution 1, explanation 2, system 1)"


def test_length_limit_without_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_tokens=5 cannot be checked"):
        collect_problems([raw()], max_tokens=5)
    with pytest.raises(ValueError, match="at least 1"):
        collect_problems([raw()], max_tokens=0, count_tokens=len)


def test_stop_shows_the_first_rows_and_counts_per_reason() -> None:
    rows = [raw(1)]
    rows += [raw(n, solution="") for n in range(2, 7)]
    rows += [raw(7, question=1), raw(8, solution="")]
    with pytest.raises(BadRowsError) as caught:
        collect_problems(rows)
    assert str(caught.value) == (
        "7 of 8 rows cannot be used:\n"
        "  a.jsonl, row 2: empty solution: solution is ''\n"
        "  a.jsonl, row 3: empty solution: solution is ''\n"
        "  a.jsonl, row 4: empty solution: solution is ''\n"
        "  a.jsonl, row 5: empty solution: solution is ''\n"
        "  a.jsonl, row 6: empty solution: solution is ''\n"
        "  … and 2 more\n"
        "Rows per reason: empty solution: 6, wrong type: 1.\n"
        "Repair them, or skip and count them with data.on_bad_row=skip."
    )


def test_skip_counts_bad_rows_and_duplicates() -> None:
    rows = [raw(1), raw(2, solution=""), raw(3), raw(4, solution="5"), raw(5, solution=4)]
    actual = collect_problems(rows, "skip")
    assert [problem.solution for problem in actual.problems] == ["4", "5"]
    assert (actual.read, actual.duplicates_dropped) == (5, 2)
    assert actual.bad_per_reason() == {"empty solution": 1}
    assert (actual.bad_rows[0].file, actual.bad_rows[0].row) == ("a.jsonl", 2)
    assert len(collect_problems(rows, "skip", unique=False).problems) == 4


def test_unknown_way_with_bad_rows() -> None:
    with pytest.raises(ValueError, match="'ignore'; it must be 'stop' or 'skip'"):
        collect_problems([], "ignore")


def test_columns() -> None:
    columns = check_columns({"question": "q", "solution": "a", "explanation": None})
    assert columns == {"question": "q", "solution": "a"}
    mapped = map_columns(RawRow("f", 3, {"q": "?", "a": 1, "z": 0}), columns, False)
    assert mapped.values == {"question": "?", "solution": 1}
    broken = map_columns(RawRow("f", 3, {"q": "?", "answer": 1}), {"solution": "answr"}, True)
    assert broken.fault is not None
    assert str(broken.fault) == (
        "missing column: no 'answr' (for solution) among: q, answer; did you mean 'answer'?"
    )
    with pytest.raises(ValueError, match="did you mean 'solution'"):
        check_columns({"question": "q", "soluton": "a"})
    with pytest.raises(ValueError, match="no column for solution"):
        check_columns({"question": "q", "solution": None})
