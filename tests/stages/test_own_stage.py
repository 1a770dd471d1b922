"""docs/howto/stage.md: a stage of one's own is one module and one YAML file."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.cli import rlt_command, rlt_environment

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "stage.md"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with the files that the page shows."""
    for title, text in re.findall(r'```\w+ title="([^"]+)"\n(.*?)```', PAGE.read_text(), re.DOTALL):
        (tmp_path / title).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / title).write_text(text)
    return tmp_path


def run(own: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    environment = rlt_environment()
    path = f"{own}:{environment.get('PYTHONPATH', '')}"
    return subprocess.run(
        rlt_command(["--config-dir=my", "stage=count_words", *overrides]),
        cwd=own, env=environment | {"RLT_ALLOW": "my_stages.*", "PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_it_runs(own: Path) -> None:
    done = run(own, "data.source.count=64", "output_dir=out")
    assert done.returncode == 0, done.stderr
    assert "count/words_per_question 7." in done.stdout
    assert json.loads((own / "out" / "metrics.json").read_text()) == {
        "count/words_per_question": 7.0
    }
    assert len(json.loads((own / "out" / "longest.json").read_text())) == 3
    assert "count_words" in (own / "out" / "report.md").read_text().splitlines()[0]


def test_all_that_is_wrong_with_its_config_is_told(own: Path) -> None:
    done = run(own, "longest=0", "seed=x")
    assert done.returncode == 2
    assert "longest=0: must be a whole number of at least 1" in done.stderr
    assert "seed='x': must be a whole number" in done.stderr
    done = run(own, "+longst=1")
    assert "longst: no such key; did you mean 'longest'?" in done.stderr
