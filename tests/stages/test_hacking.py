"""On a teacher that comes to leak the monitors ring; on one that teaches they stay silent."""

import re
from pathlib import Path

import pytest

from tests.cli import read, rlt


@pytest.mark.slow
def test_monitors_ring_where_the_reward_is_hacked(tmp_path: Path) -> None:
    rung = {}
    for arm in ("solution_only", "rlt"):
        command = ["experiment=quickstart", f"arm={arm}", f"output_dir={arm}"]
        done = rlt(command, tmp_path, limit_seconds=1200)
        told = done.stdout + done.stderr
        rung[arm] = sorted(set(re.findall(r"monitor/(\w+) is [^ ]+ healthy", told)))
        shares = read(tmp_path / arm / "metrics.json")
        behaviour = "leak" if arm == "solution_only" else "step"
        assert shares[f"teacher/validation/behaviour/{behaviour}_rate"] > 0.8
    assert "solution_early_excess" in rung["solution_only"]
    assert rung["rlt"] == []
    report = (tmp_path / "solution_only" / "steps" / "teacher" / "report.md").read_text()
    assert re.search(r"`monitor/solution_early_excess` .*\*\*outside\*\*", report)
    silent = (tmp_path / "rlt" / "steps" / "teacher" / "report.md").read_text()
    assert "Is the reward being hacked?" in silent and "**outside**" not in silent
