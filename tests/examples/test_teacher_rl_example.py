"""The example runs as it is told to be run, and its reward rises."""

import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean

SCRIPT = Path(__file__).parents[2] / "examples" / "teacher_rl.py"


def test_the_reward_rises() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], cwd=SCRIPT.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rewards = [float(value) for value in re.findall(r"reward +(-?[\d.]+)", done.stdout)]
    assert len(rewards) == 30
    assert fmean(rewards[-5:]) > fmean(rewards[:5]) + 0.5
