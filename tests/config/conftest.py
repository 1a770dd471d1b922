"""A command that must be refused, run inside this process."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlt.cli import main


@pytest.fixture
def cli(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """`cli(*arguments)`: what a failing `rlt` command writes to stderr; it must exit with 2."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["rlt", *arguments])
        with pytest.raises(SystemExit) as caught:
            main.main()
        assert caught.value.code == 2
        assert [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".yaml"] == []
        return capsys.readouterr().err.strip()

    return call
