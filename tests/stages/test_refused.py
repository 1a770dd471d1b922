"""What a run must not begin with: exit status 2, one message that says what to change."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli import here, read, refused, stage
from tests.stages.killing import finish

Refuse = Callable[..., str]


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "notes.txt").write_text("mine")
    message = refused(stage("pretrain", "output_dir=thesis"), tmp_path)
    assert "thesis is not empty and holds no run (found notes.txt)" in message
    assert "choose another output_dir" in message
    assert [f.name for f in (tmp_path / "thesis").iterdir()] == ["notes.txt"]


def test_folder_of_another_config_is_refused(chain: Path, refuse: Refuse) -> None:
    before = (chain / "evaluate" / "metrics.json").read_bytes()
    paths = ["output_dir=evaluate", "student_path=distill/model"]
    message = refuse(*stage("evaluate", *paths, "samples=2"), cwd=chain)
    assert "holds a run of another config (samples: 3 there, 2 here)" in message
    assert (chain / "evaluate" / "metrics.json").read_bytes() == before


def test_distillation_without_traces(refuse: Refuse) -> None:
    assert "stage=distill needs traces=<run>/traces" in refuse(*stage("distill"))


def test_traces_that_are_not_read(tmp_path: Path, refuse: Refuse) -> None:
    (tmp_path / "traces.jsonl").write_text("{}\n")
    message = refuse(*stage("distill", "traces=traces", "explanations=none"))
    assert "traces=traces would not be read with explanations=none" in message


def test_traces_file_is_missing(refuse: Refuse) -> None:
    message = refuse(*stage("distill", "traces=nowhere/traces"))
    assert "nowhere/traces: no such file" in message
    assert "give <run>/traces" in message or "or <run>/traces" in message


@pytest.mark.parametrize("path", ["nowhere/model", "/nowhere/model", "nowhere"])
def test_model_folder_is_missing(refuse: Refuse, path: str) -> None:
    message = refuse(*stage("teacher_rl", f"teacher_path={path}"))
    assert f"{path}: no such" in message
    assert "give <run>/model" in message


def test_different_tokenizers(refuse: Refuse) -> None:
    message = refuse(*stage("teacher_rl", "model@student=micro", "reward_student=student"))
    assert "teacher and student have different tokenizers (28 and 263 tokens)" in message


def test_student_that_is_not_used(refuse: Refuse) -> None:
    message = refuse(*stage("teacher_rl", "model@student=nano"))
    assert "reward_student=reference does not use it" in message


def test_student_path_that_is_not_used(chain: Path, refuse: Refuse) -> None:
    message = refuse(*stage("teacher_rl", f"student_path={chain / 'distill' / 'model'}"))
    assert "is not used with reward_student=reference" in message


def test_reward_for_a_stage_without_one(refuse: Refuse) -> None:
    assert "reward" in refuse(*stage("distill", "reward=rlt"))


def write_rows(folder: Path) -> list[str]:
    """Six good rows, and a broken one of each kind; the arguments to read them."""
    rows = [
        {"question": f"{n} 2 . . . . .", "solution": str(n + 2), "why": f"{n} {n + 2}"}
        for n in range(6)
    ]
    broken = [
        {"question": "1 1 . . . . .", "why": "1 2"},  # row 7
        {"question": "1 1 . . . . .", "solution": " ", "why": "1 2"},  # row 8
        {"question": ["1", "1"], "solution": "2", "why": "1 2"},  # row 9
        {"question": "1 1 . . . . .", "solution": "2", "why": "1 </think> 2"},  # row 10
        {"question": "1 1 . . . . .", "solution": "", "why": "1 2"},  # row 11
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows + broken)
    (folder / "mine.jsonl").write_text(lines)
    own = [arg for arg in stage("teacher_sft") if not arg.startswith("data.")]
    return [
        *own,
        "data=jsonl",
        "data.source.files=mine.jsonl",
        "data.source.columns.explanation=why",
    ]


def test_broken_rows_stop_the_run(tmp_path: Path) -> None:
    message = refused([*write_rows(tmp_path), "output_dir=run"], tmp_path)
    assert "5 of 11 rows cannot be used" in message
    assert "mine.jsonl, row 7: missing column: no 'solution'" in message
    assert "mine.jsonl, row 9: wrong type: question is a list, not text" in message
    assert "mine.jsonl, row 10: tag inside the text: explanation holds '</think>'" in message
    counts = "empty solution: 2, missing column: 1, wrong type: 1, tag inside the text: 1"
    assert f"Rows per reason: {counts}" in message
    assert "data.on_bad_row=skip" in message
    assert "loading the" not in message


def test_a_run_that_made_nothing_gives_its_folder_to_the_next(base: Path, tmp_path: Path) -> None:
    """Broken rows are skipped, or repaired, with the same output_dir."""
    command = [*write_rows(tmp_path), f"teacher_path={base}", "output_dir=run"]
    refused(command, tmp_path)
    manifest = read(tmp_path / "run" / "manifest.json")
    assert manifest["status"] == "failed" and "5 of 11 rows" in manifest["error"]
    finish([*command, "data.on_bad_row=skip"], tmp_path)
    manifest = read(tmp_path / "run" / "manifest.json")
    assert manifest["status"] == "finished" and "error" not in manifest
    assert len(manifest["began"]) == 1
    assert "holds a run of another config" in refused(command, tmp_path)


def test_broken_rows_are_skipped_and_counted(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*write_rows(tmp_path), f"teacher_path={base}", "data.validation_fraction=0.3"]
    here([*arguments, "data.on_bad_row=skip", "output_dir=run"], tmp_path, monkeypatch)
    data = read(tmp_path / "run" / "manifest.json")["data"]
    assert (data["read"], data["kept"]) == (11, 6)
    assert data["bad"] == {
        "empty solution": 2, "missing column": 1, "wrong type": 1, "tag inside the text": 1
    }  # fmt: skip
    assert data["bad_rows"][0].startswith("mine.jsonl, row 7: missing column")


def test_text_outside_of_the_vocabulary_is_told_by_a_check(tmp_path: Path, refuse: Refuse) -> None:
    row = {"question": "What is 2 plus 9?", "solution": "11"}
    (tmp_path / "mine.jsonl").write_text((json.dumps(row) + "\n") * 2)
    data = ["data=jsonl", "data.source.files=mine.jsonl", "data.validation_fraction=0"]
    message = refuse("stage=teacher_rl", *data, "datamodule.batch_size=1", "check=true")
    assert "a word that the tokenizer does not know" in message


def test_text_outside_of_the_vocabulary(tmp_path: Path, refuse: Refuse) -> None:
    (tmp_path / "mine.jsonl").write_text('{"question": "1 plus 1", "solution": "2"}\n' * 2)
    files = ["data=jsonl", "data.source.files=mine.jsonl", "data.validation_fraction=0"]
    own = [arg for arg in stage("teacher_rl") if not arg.startswith("data.")]
    message = refuse(*own, *files)
    assert "plus" in message
    assert "model@teacher=micro" in message or "model=micro" in message
