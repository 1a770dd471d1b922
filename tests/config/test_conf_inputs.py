"""What a run reads besides its config is part of its key."""

from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from omegaconf import DictConfig

from rlt.cli import main
from rlt.config import compose
from rlt.preflight.inputs import hub_refusal
from rlt.stages.steps import input_fingerprints

Composed = Callable[..., DictConfig]


@pytest.mark.parametrize(
    "key", ["otherwise.teacher_system_file", "tags_are_tokens.student_system_file"]
)
def test_prompt_files_within_the_default_style(
    composed: Composed, tmp_path: Path, key: str
) -> None:
    file = tmp_path / "system.txt"
    file.write_text("Explain.")
    cfg = composed("stage=teacher_sft", f"prompt.{key}={file}")
    first = input_fingerprints(cfg)[f"prompt.{key}"]
    file.write_text("Explain well.")
    assert input_fingerprints(cfg)[f"prompt.{key}"] != first
    assert len(input_fingerprints(composed("stage=teacher_sft"))) == 1  # the data alone


def test_a_hub_that_refuses_is_told_from_one_that_is_not_reached() -> None:
    def caused(by: Exception) -> OSError:
        error = OSError("is not a valid model identifier")
        error.__cause__ = by
        return error

    missing = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    assert hub_refusal(caused(missing)) == "RepositoryNotFoundError"
    offline = LocalEntryNotFoundError.__new__(LocalEntryNotFoundError)
    assert hub_refusal(caused(offline)) is None
    assert hub_refusal(caused(ConnectionError())) is None
    overloaded = HfHubHTTPError.__new__(HfHubHTTPError)  # a 503 says nothing of the model
    assert hub_refusal(caused(overloaded)) is None


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_lists_every_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["rlt", *arguments])
    main.main()
    lines = capsys.readouterr().out.splitlines()
    listed = {line.partition(":")[0]: line.partition(":")[2] for line in lines}
    assert listed["algorithm"] == " bnpo, cispo, dapo, dr_grpo, grpo, gspo"
    assert "smollm2_135m_packaged" in listed["model@teacher, model@student"]
    folders = {p.name for p in compose.config_dir().iterdir() if p.is_dir()} - {"recipe", "model"}
    assert folders <= listed.keys()
    assert not any("_benchmark" in line for line in lines)
    assert any(line.startswith("rlt experiment=quickstart") for line in lines)
