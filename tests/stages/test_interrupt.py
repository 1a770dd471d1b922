"""Ctrl-C in the middle: the same command goes on, and ends where an uninterrupted run ends."""

import json
import shutil
import signal
from pathlib import Path

from tests.cli import interrupt, pipeline_from, read, results, stage
from tests.stages.killing import finish
from tests.stages.same import assert_same_training

RL = stage("teacher_rl", "teacher_path=teacher_sft/model")


def go_on(arguments: list[str], chain: Path, folder: Path) -> str:
    output = finish(arguments, chain)
    assert len(read(folder / "manifest.json")["began"]) == 2
    return output


def begin_again_after_the_last_step(whole: Path, folder: Path) -> None:
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "model")
    (folder / "metrics.json").unlink()
    manifest = read(folder / "manifest.json") | {"status": "running"}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_teacher_rl_goes_on_from_its_checkpoint(chain: Path) -> None:
    folder = chain / "rl_cut"
    command = [*RL, "output_dir=rl_cut"]
    samples = folder / "samples.jsonl"
    # Two samples a step: the third step is under way, and its samples will be written again.
    output = interrupt(
        command, chain, lambda: samples.is_file() and samples.read_text().count("\n") >= 6
    )
    assert "Training was interrupted. Checkpoints: the newest is of step " in output
    assert f"rlt resume {folder}\n" in output
    assert not (folder / "model").exists()
    assert read(folder / "manifest.json")["status"] == "interrupted"
    assert "resuming from step=0000000" in go_on(command, chain, folder)
    assert_same_training(folder, chain / "teacher_rl")


def test_a_damaged_checkpoint_is_set_aside(chain: Path) -> None:
    folder = chain / "rl_damaged"
    begin_again_after_the_last_step(chain / "teacher_rl", folder)
    newest = folder / "checkpoints" / "step=00000006.ckpt"
    newest.write_bytes(newest.read_bytes()[:-100])
    output = go_on([*RL, "output_dir=rl_damaged"], chain, folder)
    warnings = [line for line in output.splitlines() if "step=00000006.ckpt" in line]
    assert len(warnings) == 1 and "not the" in warnings[0], output
    assert "resuming from step=00000004.ckpt" in output
    assert (folder / "checkpoints" / "step=00000006.ckpt.damaged").is_file()
    assert_same_training(folder, chain / "teacher_rl")


def test_sigterm_is_told_from_a_run_that_has_finished(chain: Path) -> None:
    folder = chain / "rl_terminated"
    samples = folder / "samples.jsonl"
    output = interrupt(
        [*RL, "output_dir=rl_terminated"], chain, samples.is_file, how=signal.SIGTERM
    )
    assert f"rlt resume {folder}\n" in output
    assert read(folder / "manifest.json")["status"] == "interrupted"


def test_resumed_after_the_last_step(chain: Path) -> None:
    """Stopped between the last checkpoint and the end: nothing is trained, nothing is lost."""
    folder = chain / "rl_last"
    begin_again_after_the_last_step(chain / "teacher_rl", folder)
    assert "resuming from step=00000006" in go_on([*RL, "output_dir=rl_last"], chain, folder)
    assert_same_training(folder, chain / "teacher_rl")


def test_collect_goes_on_without_gap_or_repetition(chain: Path) -> None:
    folder = chain / "collect_cut"
    paths = ["teacher_path=teacher_rl/model", "student_path=pretrain/model"]
    command = stage("collect", "output_dir=collect_cut", *paths)
    partial = folder / "traces.partial"
    output = interrupt(command, chain, lambda: partial.is_file() and partial.stat().st_size > 0)
    assert f"rlt resume {folder}\n" in output
    assert 1 <= len(partial.read_text().splitlines()) < 8
    go_on(command, chain, folder)
    assert not partial.exists()
    expected = (chain / "collect" / "traces.jsonl").read_bytes()
    assert (folder / "traces.jsonl").read_bytes() == expected
    assert results(folder) == results(chain / "collect")


def test_evaluate_goes_on_without_gap_or_repetition(chain: Path) -> None:
    folder = chain / "evaluate_cut"
    command = stage("evaluate", "output_dir=evaluate_cut", "student_path=distill/model")
    partial = folder / "answers.partial"
    output = interrupt(
        command, chain, lambda: partial.is_file() and partial.stat().st_size > 0,
        how=signal.SIGTERM,  # a stage without a trainer: it ends at once, with 143
    )  # fmt: skip
    assert f"rlt resume {folder}\n" in output
    go_on(command, chain, folder)
    expected = (chain / "evaluate" / "answers.jsonl").read_bytes()
    assert (folder / "answers.jsonl").read_bytes() == expected
    assert results(folder) == results(chain / "evaluate")


def test_pipeline_goes_on_at_the_step_it_had_reached(base: Path, piped: Path) -> None:
    command = pipeline_from(base, "output_dir=cut", "cache_dir=cut_store")
    checkpoints = piped / "cut_store" / "teacher_rl"
    output = interrupt(
        command, piped, lambda: any(checkpoints.glob("*/checkpoints/step=00000002.ckpt"))
    )
    assert f"rlt resume {piped / 'cut'}\n" in output
    assert output.count("This goes on from here") == 1
    assert [step["name"] for step in read(piped / "cut" / "steps.json")] == ["warm_up"]
    go_on(command, piped, piped / "cut")
    steps = read(piped / "cut" / "steps.json")
    assert [step["name"] for step in steps if step["reused"]] == ["warm_up"]
    assert results(piped / "cut") == results(piped / "first")
