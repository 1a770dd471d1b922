"""Commands in docs/ that are marked as runnable: they run, in the order in which they stand."""

import re
import shlex
from pathlib import Path

import pytest

from tests.cli import here

DOCS = Path(__file__).parent.parent.parent / "docs"
# Page → what its commands leave behind.
PAGES = {
    "reproducibility.md": "base-reproduced/metrics.json",
    "sweeps.md": "ranked/leaderboard.csv",
}


def runnable(page: Path) -> list[list[str]]:
    """Arguments of every command in the blocks below a line `<!-- runnable -->`."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^<!-- runnable -->\n+```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    commands = [
        shlex.split(line, comments=True)
        for block in blocks
        for line in block.replace("\\\n", " ").splitlines()
    ]
    assert commands, f"{page} has no runnable command"
    assert all(program == "rlt" for program, *_ in commands)
    return [arguments for _, *arguments in commands]


@pytest.mark.parametrize(("page", "left"), PAGES.items())
def test_commands_run(
    page: str, left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in runnable(DOCS / page):
        here(arguments, tmp_path, monkeypatch)
    assert (tmp_path / "outputs" / left).is_file()
