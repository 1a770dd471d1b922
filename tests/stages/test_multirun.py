"""Multirun: a folder for each job, keyed by what the jobs differ in."""

from pathlib import Path

from tests.stages.cli import read, results, rlt, weights


def test_rewards_by_seeds(base: Path, tmp_path: Path) -> None:
    (tmp_path / "base").symlink_to(base)
    tiny = ["debug=teacher_rl", "data.source.count=48", "hardware.threads=1"]
    command = ["-m", "stage=teacher_rl", *tiny, "teacher_path=base", "output_dir=sweep"]
    rlt([*command, "reward=rlt,solution_only", "seed=0,1"], tmp_path)
    runs = {}
    for file in (tmp_path / "sweep").rglob("manifest.json"):
        manifest = read(file)
        assert manifest["status"] == "finished"
        has_kl = any("thought_kl" in name for name in results(file.parent))
        runs["rlt" if has_kl else "solution_only", manifest["seed"]] = file.parent
    assert set(runs) == {("rlt", 0), ("rlt", 1), ("solution_only", 0), ("solution_only", 1)}
    assert len({weights(run) for run in runs.values()}) == 4
    for (reward, seed), run in runs.items():
        name = str(run.relative_to(tmp_path))
        assert f"reward={reward}" in name
        assert f"seed={seed}" in name
