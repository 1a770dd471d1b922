"""A real language model: does teacher RL raise the reward of SmolLM2 on grade-school problems?"""

from pathlib import Path

import pytest

from rlt.evaluation.statistics import paired_difference_interval
from tests.cli import read, read_lines, rlt

LATER_STEPS = ["~steps.traces", "~steps.student", "~steps.base_accuracy", "~steps.accuracy"]


@pytest.mark.slow
def test_reward_rises(tmp_path: Path) -> None:
    """The warm-up and the RL of experiment=smollm2_gsm: a quarter of an hour on two cores."""
    pytest.importorskip("gguf")
    rlt(["experiment=smollm2_gsm", *LATER_STEPS, "output_dir=run"], tmp_path, limit_seconds=7200)
    warm_up, teacher = read(tmp_path / "run" / "steps.json")
    losses = warm_up["metrics"]
    assert losses["validation/loss"] < losses["start/validation/loss"]
    rows = read_lines(Path(teacher["dir"]) / "held_out_rewards.jsonl")
    first, last = (
        {row["problem_id"]: row["reward"] for row in rows if row["step"] == step}
        for step in (0, max(row["step"] for row in rows))
    )
    assert first.keys() == last.keys() and len(first) == 16
    change = paired_difference_interval([last[p] for p in first], [first[p] for p in first])
    print(f"held-out reward, last minus first: {change}")
    assert change.mean > 0
