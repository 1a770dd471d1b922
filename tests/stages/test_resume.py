"""`rlt resume`, and what may change when a run goes on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from rlt.report import read_scalars
from rlt.runs import folder as run_folder
from tests.cli import here, pipeline_from, read, results, stage, weights
from tests.stages.killing import finish

RL = stage("teacher_rl", "teacher_path=teacher_sft/model")
Resume = Callable[..., str]


@pytest.fixture
def resume(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Resume:
    """`resume(folder, *overrides)` from some other folder; what is written, errors included."""

    def run(folder: str, *overrides: str, status: int = 0) -> str:
        capfd.readouterr()
        here(["resume", str(chain / folder), *overrides], tmp_path, monkeypatch, status)
        written = "".join(capfd.readouterr())
        assert "Traceback" not in written
        return written

    return run


@pytest.fixture
def trained(chain: Path, request: pytest.FixtureRequest) -> str:
    """Name of a copy of the chain's teacher RL run, for this test alone."""
    name = f"rl_{abs(hash(request.node.name))}"
    shutil.copytree(chain / "teacher_rl", chain / name)
    return name


def test_a_finished_run_is_left_alone(chain: Path, resume: Resume, trained: str) -> None:
    assert "already finished, nothing to do" in resume(trained)
    assert weights(chain / trained) == weights(chain / "teacher_rl")


def test_a_finished_run_is_trained_for_longer(
    chain: Path, resume: Resume, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as if it had been trained that long from the start."""
    written = resume(trained, "datamodule.steps=8", "callbacks.checkpoint.every_steps=1")
    assert "going on with" in written and "datamodule.steps: 6 before, 8 now" in written
    here([*RL, "datamodule.steps=8", "output_dir=rl_eight"], chain, monkeypatch)
    assert weights(chain / trained) == weights(chain / "rl_eight")
    assert results(chain / trained) == results(chain / "rl_eight")
    told = read(chain / trained / "manifest.json")["went_on_with"]
    assert told[0]["changes"]["datamodule.steps"] == [6, 8]


def test_fewer_steps_than_were_trained(resume: Resume, trained: str) -> None:
    message = resume(trained, "datamodule.steps=3", status=2)
    assert "datamodule.steps=3: this run has been trained to its end, 6" in message


def test_an_interrupted_run_that_is_refused_stays_as_it_was(
    chain: Path, resume: Resume, trained: str
) -> None:
    """Only its checkpoint tells how long it was trained: it is claimed before that is read."""
    manifest = chain / trained / "manifest.json"
    manifest.write_text(json.dumps(read(manifest) | {"status": "interrupted"}))
    names = ("manifest.json", "config.yaml", "composed.yaml")
    before = [(chain / trained / name).read_text() for name in names]
    message = resume(trained, "datamodule.steps=3", status=2)
    assert "this run has been trained for 6 steps already; give at least as many" in message
    assert [(chain / trained / name).read_text() for name in names] == before
    assert "going on where it stopped" in resume(trained)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("output_dir=elsewhere", "output_dir=elsewhere: a run goes on where it is; leave it out"),
        ("accept_changes=[optm.lr]", "accept_changes: no key optm.lr; did you mean 'optim.lr'"),
    ],
)
def test_what_would_go_unheeded_is_refused(
    resume: Resume, trained: str, override: str, message: str
) -> None:
    assert message in resume(trained, override, status=2)


def test_another_learning_rate_is_refused_unless_accepted(
    chain: Path, resume: Resume, trained: str
) -> None:
    message = resume(trained, "optim.lr=0.5", status=2)
    assert "optim.lr: 0.001 there, 0.5 here" in message
    assert "accept_changes=[optim.lr]" in message
    resume(trained, "optim.lr=1e-4", "datamodule.steps=7", "accept_changes=[optim.lr]")
    rates = [value for _, value in read_scalars(chain / trained)["policy/lr"]]
    assert rates == pytest.approx([1e-3] * 6 + [1e-4])


def test_smaller_micro_batches_reach_the_module(chain: Path, resume: Resume, trained: str) -> None:
    """They are a key that others refer to."""
    resume(trained, "hardware.tokens_per_micro_batch=64", "datamodule.steps=7")
    budgets = read_scalars(chain / trained)["policy/tokens_per_micro_batch"]
    assert budgets[-1][1] == 64


def test_no_checkpoint_to_train_on_from(chain: Path, resume: Resume, trained: str) -> None:
    before = weights(chain / trained)
    shutil.rmtree(chain / trained / "checkpoints")
    message = resume(trained, "datamodule.steps=7", status=2)
    assert "has no checkpoints any more" in message
    assert weights(chain / trained) == before


def test_a_step_is_resumed_by_its_pipeline(piped: Path, refuse: Callable[..., str]) -> None:
    step = (piped / "first" / "steps" / "warm_up").resolve()
    assert "this is a step of a pipeline" in refuse("resume", str(step))


def test_another_model_is_refused(
    chain: Path, resume: Resume, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = resume(trained, "teacher_path=pretrain/model", status=2)
    assert "teacher_path: teacher_sft/model there, pretrain/model here" in message
    assert "contents of teacher_path: " in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lrr=1"], "optim.lrr=1: no such key 'optim.lrr'; did you mean 'lr'?"),
        (["reward=length"], "resume changes values below reward, not the whole part"),
        (["+optim.amsgrad=true"], "resume takes key=value"),
        (["seed=0,1"], "resume takes key=value"),
    ],
)
def test_what_resume_does_not_take(
    resume: Resume, trained: str, overrides: list[str], message: str
) -> None:
    assert message in resume(trained, *overrides, status=2)


def test_no_run_there(resume: Resume) -> None:
    assert "no run is there (no manifest.json)" in resume("nowhere", status=2)


def test_another_process_works_there(
    chain: Path, resume: Resume, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "_SECONDS_TO_WAIT", 0.1)
    with FileLock(chain / trained / ".lock"):
        assert "is in use: another process" in resume(trained, status=2)
    resume(trained)


def test_a_pipeline_goes_on_from_any_folder(
    base: Path, piped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its relative paths start where it was begun.

    A second run of the pipeline is resumed: others read in the first which steps it made.
    """
    finish(pipeline_from(base, "output_dir=resumed"), piped)
    before = read(piped / "resumed" / "metrics.json")
    here(["resume", str(piped / "resumed")], tmp_path, monkeypatch)
    assert [step["reused"] for step in read(piped / "resumed" / "steps.json")] == [True] * 6
    assert read(piped / "resumed" / "metrics.json").keys() == before.keys()
    assert not any(tmp_path.iterdir())
