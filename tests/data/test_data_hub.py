"""Hugging Face data sets written to a local folder, and Stratos conversations."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from rlt.data.row_checks import collect_problems
from rlt.data.sources.hub import HubDataset
from rlt.data.sources.stratos import StratosConversations

COLUMNS = {"question": "problem", "solution": "answer", "explanation": None, "system": None}
ROWS = [{"problem": "1+1?", "answer": "2"}, {"problem": "2+2?", "answer": "4"}]


@pytest.fixture(autouse=True)
def _quiet_and_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def solutions(source: HubDataset | StratosConversations) -> list[str]:
    return [problem.solution for problem in collect_problems(source.rows()).problems]


def test_folders(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(
        str(tmp_path / "splits")
    )
    (tmp_path / "files").mkdir()
    table.to_parquet(str(tmp_path / "files" / "train-00000-of-00001.parquet"))
    assert solutions(HubDataset(str(tmp_path / "one"), "train", COLUMNS)) == ["2", "4"]
    assert solutions(HubDataset(str(tmp_path / "splits"), "test", COLUMNS)) == ["4"]
    assert solutions(HubDataset(str(tmp_path / "files"), "train", COLUMNS)) == ["2", "4"]
    with pytest.raises(ValueError, match="holds train, test; did you mean 'train'"):
        solutions(HubDataset(str(tmp_path / "splits"), "trian", COLUMNS))


def test_bad_rows_name_data_set_and_row(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [*ROWS, {"problem": "3+3?", "answer": None}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "one"))
    source = HubDataset(str(tmp_path / "one"), "train", COLUMNS)
    bad = collect_problems(source.rows(), "skip").bad_rows
    assert [str(each) for each in bad] == [
        f"{tmp_path}/one[train], row 3: empty solution: solution is None"
    ]
    source = HubDataset(str(tmp_path / "one"), "train", {**COLUMNS, "system": "sys"})
    assert collect_problems(source.rows(), "skip").bad_per_reason() == {"missing column": 3}


def test_solution_mark(tmp_path: Path) -> None:
    rows = [
        {"question": "q1", "answer": "2*3=<<2*3=6>>6 #### eggs\nSo 6.\n#### 6"},
        {"question": "q2", "answer": "7"},
    ]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "gsm8k"))
    columns = {"question": "question", "solution": "answer"}
    source = HubDataset(str(tmp_path / "gsm8k"), "train", columns, solution_mark="####")
    actual = collect_problems(source.rows(), "skip")
    assert [(p.solution, p.explanation) for p in actual.problems] == [
        ("6", "2*3=<<2*3=6>>6 #### eggs\nSo 6.")
    ]
    assert actual.bad_per_reason() == {"missing tags": 1}
    with pytest.raises(ValueError, match="explanation=null"):
        HubDataset("x", "train", {**columns, "explanation": "cot"}, solution_mark="####")


def test_fingerprint_depends_on_content(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    one = HubDataset(str(tmp_path / "one"), "train", COLUMNS)
    again = HubDataset(str(tmp_path / "one"), "train", COLUMNS)
    swapped = {"question": "answer", "solution": "problem"}
    other = HubDataset(str(tmp_path / "one"), "train", swapped)
    assert one.describe()["fingerprint"] == again.describe()["fingerprint"]
    assert one.describe()["fingerprint"] != other.describe()["fingerprint"]
    json.dumps(one.describe())


def test_missing_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stratos").mkdir()
    with pytest.raises(FileNotFoundError, match="did you mean 'stratos'"):
        solutions(HubDataset(str(tmp_path / "strato"), "train", COLUMNS))

    def no_hub(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", no_hub)
    with pytest.raises(ValueError, match=r"ConnectionError: Couldn't reach.*save_to_disk"):
        solutions(HubDataset("someone/something", "train", COLUMNS))


def conversation(answer: Any, question: Any = "What is 1+1?") -> dict[str, Any]:
    turns = [{"from": "user", "value": question}, {"from": "assistant", "value": answer}]
    return {"system": "Use <|begin_of_thought|>.", "conversations": turns}


GOOD = (
    "<|begin_of_thought|>\n\nOkay, so 1+1.\n\nThat is 2.\n\n<|end_of_thought|>\n\n"
    "<|begin_of_solution|>\n\nThe sum is \\boxed{2}.\n\n<|end_of_solution|>"
)


def test_stratos_from_a_folder(tmp_path: Path) -> None:
    datasets.Dataset.from_list([conversation(GOOD)]).save_to_disk(str(tmp_path / "stratos"))
    source = StratosConversations(path=str(tmp_path / "stratos"))
    [problem] = collect_problems(source.rows(), forbidden=["<|begin_of_thought|>"]).problems
    assert problem.question == "What is 1+1?"
    assert problem.explanation == "Okay, so 1+1.\n\nThat is 2."
    assert problem.solution == "The sum is \\boxed{2}."
    assert problem.system == "Use <|begin_of_thought|>."


def test_stratos_files_and_broken_rows(tmp_path: Path) -> None:
    doubled = GOOD.replace("That is 2.", "<|end_of_thought|> 2")
    rows: list[dict[str, Any]] = [
        conversation(GOOD),
        conversation("The sum is 2."),
        conversation(GOOD.removesuffix("<|end_of_solution|>")),
        conversation(GOOD.replace("The sum is \\boxed{2}.", " ")),
        conversation(doubled),
        {"system": "s"},
        {"conversations": "user: hello"},
        {"conversations": conversation(GOOD)["conversations"][:1]},
        conversation(None),
        conversation(GOOD, question=""),
        {"conversations": conversation(GOOD, "no system here")["conversations"]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = StratosConversations(files=str(path))
    actual = collect_problems(source.rows(), "skip")
    assert [(p.question, p.system) for p in actual.problems] == [
        ("What is 1+1?", "Use <|begin_of_thought|>."),
        ("no system here", None),
    ]
    assert [(bad.row, bad.reason) for bad in actual.bad_rows] == [
        (2, "missing tags"),
        (3, "missing tags"),
        (4, "empty solution"),
        (5, "tag inside the text"),
        (6, "missing column"),
        (7, "wrong type"),
        (8, "wrong type"),
        (9, "wrong type"),
        (10, "empty question"),
    ]
    assert source.describe()["files"] == [str(path)]


def test_stratos_needs_exactly_one_place() -> None:
    with pytest.raises(ValueError, match="set exactly one"):
        StratosConversations()
    with pytest.raises(ValueError, match="set exactly one"):
        StratosConversations(path="a/b", files="c.jsonl")
