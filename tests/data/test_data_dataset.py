"""The split, the report, and every file of conf/data."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from rlt.data.dataset import ProblemData, in_validation, split_problems
from rlt.data.problem import make_problem
from rlt.data.rows import BadRowsError, RawRow
from rlt.data.sources.digit_chain_text import read_question

CONF = Path(__file__).parents[2] / "conf"
DATA_FILES = sorted(path.stem for path in (CONF / "data").glob("*.yaml") if path.stem[0] != "_")


class Fixed:
    """A source with the rows of its argument."""

    def __init__(self, *values: dict[str, Any]) -> None:
        self.values = values

    def rows(self) -> Iterator[RawRow]:
        return (RawRow("fixed", n, values) for n, values in enumerate(self.values, start=1))

    def describe(self) -> dict[str, Any]:
        return {"kind": "Fixed", "fingerprint": "f"}


def numbered(count: int) -> Fixed:
    return Fixed(*({"question": f"q{n}", "solution": str(n)} for n in range(count)))


@given(
    st.lists(st.tuples(st.text(max_size=3), st.text(max_size=3)), max_size=40),
    st.floats(0, 0.999),
)
def test_split_has_no_overlap_and_keeps_order(pairs: list[tuple[str, str]], share: float) -> None:
    problems = [make_problem(question, solution) for question, solution in pairs]
    train, validation = split_problems(problems, share)
    sides = {problem.question for problem in train}, {problem.question for problem in validation}
    assert sides[0].isdisjoint(sides[1])
    assert train == [problem for problem in problems if problem.question in sides[0]]
    assert validation == [problem for problem in problems if problem.question in sides[1]]
    assert len(train) + len(validation) == len(problems)
    if share == 0:
        assert validation == []
    elif len(sides[0] | sides[1]) >= 2:
        assert len(train) >= 1 and len(validation) >= 1


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_keeps_what_a_smaller_chose(key: str, one: float, other: float) -> None:
    small, large = sorted((one, other))
    assert not in_validation(key, 0.0)
    assert in_validation(key, 1.0)
    assert in_validation(key, large) or not in_validation(key, small)


def test_split_does_not_depend_on_the_other_rows() -> None:
    problems = [make_problem(f"q{n}", "1") for n in range(2000)]
    _, validation = split_problems(problems, 0.25)
    assert abs(len(validation) - 500) < 100  # five standard deviations
    _, of_half = split_problems(problems[::-2], 0.25)
    assert {p.id for p in of_half} == {p.id for p in validation} & {p.id for p in problems[::-2]}


THIRDS = {"reward_student": 0.25, "teacher": 0.75}


def test_parts_divide_what_is_not_held_out() -> None:
    def load(part: str | None, parts: Any = THIRDS) -> Any:
        return ProblemData(numbered(400), validation_fraction=0.2, parts=parts, part=part).load()

    student, teacher, undivided = load("reward_student"), load("teacher"), load(None, None)
    ids = {one.id for one in student.train}, {one.id for one in teacher.train}
    assert ids[0].isdisjoint(ids[1])
    assert ids[0] | ids[1] == {one.id for one in undivided.train}
    assert student.validation == teacher.validation == undivided.validation
    assert abs(len(ids[0]) - 80) < 30  # a quarter of 320, within four standard deviations
    assert student.report["part"] == "reward_student"
    assert "part" not in undivided.report


def test_a_part_keeps_its_problems_whatever_other_rows_there_are() -> None:
    few = ProblemData(numbered(50), parts=THIRDS, part="teacher").load().train
    many = ProblemData(numbered(500), parts=THIRDS, part="teacher").load().train
    assert {one.id for one in few} <= {one.id for one in many}


@pytest.mark.parametrize(
    ("parts", "part", "message"),
    [
        (None, "teacher", "set both"),
        (THIRDS, None, "set both"),
        (THIRDS, "teachr", "data.part=teachr: data.parts has reward_student, teacher; did you"),
        ({"a": 0.5, "b": 0.4}, "a", "shares must be above 0 and add up to 1"),
        ({"a": 1.5, "b": -0.5}, "a", "shares must be above 0 and add up to 1"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts: Any, part: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProblemData(numbered(4), parts=parts, part=part)


def test_an_empty_part_is_refused() -> None:
    rare = ProblemData(numbered(3), parts={"a": 1e-9, "b": 1 - 1e-9}, part="a")
    with pytest.raises(ValueError, match=r"data.part=a: none of the 3 problems falls into"):
        rare.load()


def test_load_reports_what_it_did() -> None:
    rows = [{"question": f"q{n}", "solution": str(n)} for n in range(8)]
    source = Fixed(*rows, rows[0], {"question": "", "solution": "1"}, {"question": "q"})
    data = ProblemData(source, on_bad_row="skip", validation_fraction=0.5, max_train=2)
    split = data.load()
    fingerprint = split.report.pop("fingerprint")
    assert split.report == {
        "source": {"kind": "Fixed", "fingerprint": "f"},
        "read": 11,
        "kept": 8,
        "bad": {"empty question": 1, "missing column": 1},
        "bad_rows": [
            "fixed, row 10: empty question: question is ''",
            "fixed, row 11: missing column: no solution",
        ],
        "duplicates": 1,
        "train": 2,
        "validation": len(split.validation),
    }
    json.dumps(split.report)
    assert data.load().report["fingerprint"] == fingerprint
    other = Fixed(*rows[:7], {**rows[7], "explanation": "because"})
    changed = ProblemData(other, validation_fraction=0.5).load().report["fingerprint"]
    assert (
        changed != ProblemData(Fixed(*rows), validation_fraction=0.5).load().report["fingerprint"]
    )


def test_load_stops_at_bad_rows_and_checks_tags_and_length() -> None:
    with pytest.raises(BadRowsError, match="tag inside the text: 4"):
        ProblemData(numbered(4)).load(forbidden=["q"])
    with pytest.raises(BadRowsError, match="over the length limit: 4"):
        ProblemData(numbered(4), max_tokens=2).load(count_tokens=len)
    assert len(ProblemData(numbered(4), "stop", 0, max_tokens=3).load((), len).train) == 4
    with pytest.raises(ValueError, match="no problem is left of 4 rows"):
        ProblemData(numbered(4), on_bad_row="skip").load(forbidden=["q"])


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_share_is_checked(share: float) -> None:
    with pytest.raises(ValueError, match="validation_fraction"):
        ProblemData(numbered(4), validation_fraction=share).load()


def test_counts_are_checked() -> None:
    with pytest.raises(ValueError, match=r"max_train=0"):
        ProblemData(numbered(4), max_train=0)


def composed(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(overrides=[f"+data={name}", "+seed=3", *overrides])
    return cfg


OVERRIDES = {
    "reasoning_gym": ["data.source.task=gcd", "data.source.size=20"],
    "gsm_symbolic": ["data.source.size=20"],
    "chain_sum": ["data.source.size=20"],
    "countdown": ["data.source.size=20"],
    "digit_chain_pretrain": ["data.source.count=2000"],
}


@pytest.mark.parametrize("name", DATA_FILES)
def test_every_data_config_has_a_grader_and_known_keys(name: str) -> None:
    data = composed(name, *OVERRIDES.get(name, [])).data
    assert data._convert_ == "all"
    assert data.grader._target_.startswith("rlt.evaluation.graders.")
    if name == "reasoning_gym":
        assert data.grader.task == "gcd"
    data.grader = None
    if OmegaConf.missing_keys(data):
        return
    loader = instantiate(data)
    assert isinstance(loader, ProblemData)
    if name in ("bespoke_stratos", "gsm8k"):  # their rows come from the hub
        return
    split = loader.load(forbidden=["<think>"])
    assert len(split.train) == split.report["train"] >= 1
    assert len(split.validation) == split.report["validation"] >= 1
    if "seed" in data.source:
        assert split.report["source"]["seed"] == 3


def test_digit_chain_arms_hold_out_the_same_problems() -> None:
    names = ("digit_chain", "digit_chain_gold", "digit_chain_solution_only")
    splits = []
    for name in names:
        data = composed(name).data
        data.grader = None
        splits.append(instantiate(data).load())
    for split in splits:
        assert len(split.train) == len(split.validation) == 1024
        assert [p.id for p in split.train] == [p.id for p in splits[0].train]
    assert {p.metadata["behaviour"] for p in splits[1].train} == {"step"}
    assert {p.explanation for p in splits[2].train} == {""}
    assert {len(read_question(p.question)[0]) for p in splits[0].train} == {7}


def test_a_length_added_on_the_command_line() -> None:
    data = composed("digit_chain", "+data.source.lengths.5=1").data
    data.grader = None
    problems = instantiate(data).load().train
    assert {len(read_question(problem.question)[0]) for problem in problems} == {5, 7}


def test_file_configs_read_files(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("q,solution\none,1\ntwo,2\n")
    data = composed(
        "csv", f"data.source.files={tmp_path}/*.csv", "data.source.columns.question=q"
    ).data
    data.grader = None
    split = instantiate(data).load()
    assert {problem.question for problem in split.train + split.validation} == {"one", "two"}


def test_no_torch() -> None:
    sources = "digit_chain, files, hub, procedural, stratos"
    code = (
        f"import sys; from rlt.data import dataset, rows; from rlt.data.sources import {sources}; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CONF.parent)
