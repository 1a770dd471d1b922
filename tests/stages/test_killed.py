"""SIGKILL anywhere, then the same command until it has finished: nothing tells it from one run."""

import random
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.cli import pipeline_from, read, results, stage
from tests.stages.killing import At, finish, killed, killed_after
from tests.stages.same import assert_same, assert_same_training, scalars

RL = stage("teacher_rl", "teacher_path=teacher_sft/model")
SAMPLE = "rlt.sampling.hf:HFRollout.sample"
SCORE = "rlt.rewards.scorer:RewardScorer.__call__"
BACKWARD = "rlt.training.policy:PolicyModule.manual_backward"
STEP = "torch.optim:AdamW.step"
SCHEDULE = "rlt.training.policy:PolicyModule.lr_schedulers"  # the weights have moved, the rate not
VALIDATE = "rlt.training.rl:RL.validation_step"
VALIDATED = "rlt.training.rl:RL.on_validation_epoch_end"
SAVE = "torch:save"
HASH = "rlt.training.checkpoints:_sha256"  # written, not yet renamed
SYNC = "rlt.training.checkpoints:_sync"  # renamed, or listed
SAVE_MODEL = "rlt.stages.training:save_model"
SAVE_TOKENIZER = "transformers:PreTrainedTokenizerBase.save_pretrained"
RECORD = "rlt.runs.folder:RunFolder.record"
FINISH = "rlt.runs.folder:RunFolder.finish"
REPORT = "rlt.report:write_result"
WRITE_TRACES = "rlt.stages.collect:write_traces"
CLAIM = "rlt.runs.environment:git_revision"  # while the folder is claimed


def kill_often(command: Sequence[str], cwd: Path, seed: int, kills: int, whole: Path) -> int:
    """Kill at random moments of the time that the whole run took, and then run to the end.

    Returns:
        How often it was killed; less than `kills` if it was faster.
    """
    longest = 4 + read(whole / "manifest.json")["seconds"]  # its clock starts after the imports
    moments = random.Random(seed)
    for done in range(kills):
        if killed_after([*command], cwd, moments.uniform(0.1, longest)):
            return done
    finish([*command], cwd)
    return kills


def test_killed_beside_its_checkpoint(chain: Path) -> None:
    """A file that is not listed; a validation that was cut short; then Ctrl-C in a rollout."""
    command = [*RL, "output_dir=rl_killed"]
    folder = chain / "rl_killed"
    killed(command, chain, At(SYNC, 2))
    assert read(folder / "checkpoints" / "manifest.json") == []
    assert (folder / "checkpoints" / "step=00000002.ckpt").is_file()
    killed(command, chain, At(VALIDATE, 2))
    assert [row["step"] for row in read(folder / "checkpoints" / "manifest.json")] == [2]
    output = finish(command, chain, At(SAMPLE, 4, signal.SIGINT), status=130)
    assert "resuming from step=00000002.ckpt" in output
    assert "Training was interrupted. Checkpoints: the newest is of step 3." in output
    assert "resuming from step=00000003.ckpt" in finish(command, chain)
    assert_same_training(folder, chain / "teacher_rl")


@pytest.mark.slow
def test_rl_killed_everywhere(chain: Path) -> None:
    command = [*RL, "output_dir=rl_killed_everywhere"]
    for at in [
        At(CLAIM, 1), At(RECORD, 1), At(SAMPLE, 2), At(VALIDATED, 1), At(SCORE, 3),
        At(BACKWARD, 2), At(STEP, 2), At(SAVE, 1), At(HASH, 1), At(SYNC, 2), At(SYNC, 3),
        At(VALIDATE, 1), At(VALIDATED, 1), At(SAMPLE, 3), At(SCHEDULE, 2), At(SYNC, 1),
        At(SYNC, 2), At(STEP, 2), At(SAVE_MODEL, 1), At(SAVE_TOKENIZER, 1), At(FINISH, 1),
        At(REPORT, 1),
    ]:  # fmt: skip
        killed(command, chain, at)
    finish(command, chain)
    assert_same_training(chain / "rl_killed_everywhere", chain / "teacher_rl")


@pytest.mark.slow
def test_rl_killed_after_its_last_step(chain: Path) -> None:
    """The last validation is then one of its own, as the step is none of `val_check_interval`."""
    command = [*RL, "trainer.val_check_interval=4"]
    finish([*command, "output_dir=last"], chain)
    killed([*command, "output_dir=last_killed"], chain, At(VALIDATED, 3))
    output = finish([*command, "output_dir=last_killed"], chain)
    assert "resuming from step=00000006.ckpt" in output
    assert_same_training(chain / "last_killed", chain / "last")


@pytest.mark.slow
def test_rl_killed_at_random(chain: Path) -> None:
    kills = seed = 0
    while kills < 20:
        folder = f"rl_killed_{seed}"
        command = [*RL, f"output_dir={folder}"]
        kills += kill_often(command, chain, seed, min(8, 20 - kills), chain / "teacher_rl")
        assert_same_training(chain / folder, chain / "teacher_rl")
        seed += 1


@pytest.mark.slow
def test_several_optimizer_steps_and_a_moving_reference(chain: Path) -> None:
    """Killed and interrupted between the optimizer steps of one rollout, and between rollouts."""
    command = [
        *RL, "algorithm.num_iterations=2", "algorithm.minibatches=2", "algorithm.beta=0.1",
        "algorithm.reference_update_every_steps=3",
    ]  # fmt: skip
    finish([*command, "output_dir=moving"], chain)
    cut = [*command, "output_dir=moving_cut"]
    killed(cut, chain, At(STEP, 7))
    output = finish(cut, chain, At(STEP, 11, signal.SIGINT), status=130)
    assert "the newest is of step 2" in output  # the third step was half done
    output = finish(cut, chain, At(SCORE, 4, signal.SIGINT), status=130)
    assert "the newest is of step 3" in output
    finish(cut, chain)
    assert_same_training(chain / "moving_cut", chain / "moving")


@pytest.mark.slow
def test_distill_killed(chain: Path) -> None:
    paths = ["traces=collect/traces", "student_path=pretrain/model"]
    command = stage("distill", *paths, "callbacks.checkpoint.every_steps=1")
    finish([*command, "output_dir=distilled"], chain)
    cut = [*command, "output_dir=distill_killed"]
    for at in [At(SAMPLE, 1), At(BACKWARD, 1), At(SCHEDULE, 1), At(SYNC, 2), At(SAVE_MODEL, 1)]:
        killed(cut, chain, at)
    kill_often(cut, chain, seed=0, kills=3, whole=chain / "distilled")
    assert_same_training(chain / "distill_killed", chain / "distilled")


@pytest.mark.slow
def test_collect_killed(chain: Path) -> None:
    paths = ["teacher_path=teacher_rl/model", "student_path=pretrain/model"]
    command = stage("collect", "output_dir=collect_killed", *paths)
    for at in [At(SAMPLE, 2), At(SCORE, 3), At(SAMPLE, 4), At(WRITE_TRACES, 1), At(FINISH, 1)]:
        killed(command, chain, at)
    kill_often(command, chain, seed=1, kills=3, whole=chain / "collect")
    folder, whole = chain / "collect_killed", chain / "collect"
    assert (folder / "traces.jsonl").read_bytes() == (whole / "traces.jsonl").read_bytes()
    assert results(folder) == results(whole)
    assert_same(scalars(folder), scalars(whole))


@pytest.mark.slow
def test_evaluate_killed(chain: Path) -> None:
    command = stage("evaluate", "output_dir=evaluate_killed", "student_path=distill/model")
    evaluated = "rlt.stages.evaluate:evaluate_answers"
    for at in [At(SAMPLE, 1), At(SAMPLE, 4), At(evaluated, 1), At(FINISH, 1), At(REPORT, 1)]:
        killed(command, chain, at)
    finish(command, chain)
    folder, whole = chain / "evaluate_killed", chain / "evaluate"
    assert (folder / "answers.jsonl").read_bytes() == (whole / "answers.jsonl").read_bytes()
    assert results(folder) == results(whole)
    assert_same(scalars(folder), scalars(whole))


@pytest.mark.slow
def test_pipeline_killed(base: Path, piped: Path) -> None:
    command = pipeline_from(base, "output_dir=killed", "cache_dir=killed_store")
    for at in [At(BACKWARD, 2), At(SCORE, 4), At(SYNC, 2), At(WRITE_TRACES, 1), At(FINISH, 2)]:
        killed(command, piped, at)
    kill_often(command, piped, seed=2, kills=3, whole=piped / "first")
    assert results(piped / "killed") == results(piped / "first")
