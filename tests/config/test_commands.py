"""Commands: `rlt resume`, `reproduce`, `diff`, `compare` and `where`, as they are written."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from rlt.cli import main
from rlt.cli.commands import USAGE, command_of


@pytest.fixture
def where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """`where("seed", "stage=evaluate")`: what `rlt where` prints."""

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["rlt", "where", *arguments])
        with pytest.raises(SystemExit) as ended:
            main.main()
        assert ended.value.code == 0
        return capsys.readouterr().out

    return call


def test_settings_alone_are_no_command() -> None:
    for argument in ("stage=evaluate", "+seed=1", "~note", "-m", "--cfg"):
        assert command_of([argument, "x"]) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resme", "outputs/x"], "resme: no such command; did you mean 'resume'?; the commands"),
        (["outputs/x"], "outputs/x: no such command; the commands are resume, reproduce, diff"),
        (["resume=outputs/x", "seed=1"], "resume is a command, not a key; write: rlt resume outp"),
        (["seed=1", "reproduce=outputs/x"], "a command, not a key; write: rlt reproduce outputs/x"),
        (["diff=a,b"], "diff=a,b: diff is a command, not a key; write: rlt diff a b"),
        (["resume="], "write: rlt resume <run> [key=value ...]"),
        (["resume"], "something is missing; write: rlt resume <run> [key=value ...]"),
        (["reproduce", "a", "seed=1"], "a seed=1: reproduce takes 1 run folder and nothing else"),
        (
            ["diff", "a"],
            "a: diff takes 2 run folders and nothing else; write: rlt diff <run> <run>",
        ),
        (["compare", "metric=x"], "no run is given; write: rlt compare <run> [<run> ...]"),
        (["resume", "a", "--cfg=job"], "--cfg=job: resume takes no options"),
    ],
)
def test_commands_that_are_refused(
    refuse: Callable[..., str], arguments: list[str], message: str
) -> None:
    assert message in refuse(*arguments)


def test_help_shows_the_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["rlt", "--help"])
    main.main()
    shown = capsys.readouterr().out
    assert all(f"rlt {name} {usage}\n" in shown or f"rlt {name} {usage} " in shown
               for name, usage in USAGE.items())  # fmt: skip


def test_compare_is_a_stage_over_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(sys, "argv", ["rlt"])
    monkeypatch.setattr("rlt.cli.hydra_app.compose_and_run", lambda: told.extend(sys.argv[1:]))
    job = tmp_path / "lr=1,seed=0"  # as a sweep names its jobs
    job.mkdir()
    command = command_of(["compare", "it's", str(job), "metric=accuracy"])
    assert command is not None and command() == 0
    assert [told[0], *told[2:]] == ["stage=compare", "metric=accuracy"]
    (override,) = OverridesParser.create().parse_overrides([told[1]])
    assert override.value() == ["it's", str(job)]


# --- where --------------------------------------------------------------------------------------


def test_sources_stand_in_the_order_of_precedence(where: Callable[..., str]) -> None:
    lines = where("datamodule.steps", "stage=teacher_rl", "debug=teacher_rl", "datamodule.steps=9")
    first, *sources = lines.splitlines()
    assert first == "datamodule.steps = 9"
    assert sources[0] == "  command line: datamodule.steps=9"
    names = [line.partition(": ")[0].strip() for line in sources[1:]]
    assert names[0].startswith("conf/debug/")
    assert "conf/recipe/_rl.yaml" in names
    assert all(line.endswith(", overridden") for line in sources[1:])


def test_a_key_of_every_run(where: Callable[..., str]) -> None:
    assert where("seed", "stage=evaluate") == "seed = 0\n  conf/config.yaml\n"


def test_a_part_is_shown_key_by_key(where: Callable[..., str]) -> None:
    lines = where("optim", "stage=teacher_rl", "optim={eps: 1e-3}").splitlines()
    assert "optim._target_ = torch.optim.AdamW  (conf/optim/adamw.yaml)" in lines
    assert "optim.eps = 0.001  (command line: optim={eps: 1e-3})" in lines


def test_a_file_of_the_users(where: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "mine.yaml"
    file.write_text(
        "# @package _global_\ndefaults: [{override /stage: evaluate}]\nnote: ${stage}\n"
    )
    told = where("note", "experiment=mine", f"--config-dir={tmp_path}").splitlines()
    assert told[:2] == ["note = evaluate", f"  {file}: ${{stage}}"]


def test_a_key_that_is_not_there(refuse: Callable[..., str]) -> None:
    told = refuse("where", "optim.lrr", "stage=teacher_rl")
    assert "optim.lrr: the composed config has no such key; did you mean 'lr'?" in told
