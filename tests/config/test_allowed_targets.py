"""A target that is not allowed is refused by its name, before it is imported."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlt.config.allowed_targets import ConfigError, raise_if_any
from rlt.config.check import check_targets
from tests.config.nodes import ALGORITHM, config


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("os.system", "is not an allowed target; allowed: rlt.*"),
        ("builtins.eval", "is not an allowed target; allowed: rlt.*"),
        ("subprocess.Popen", "is not an allowed target; allowed: rlt.*"),
        ("hydra.utils.instantiate", "is not an allowed target; allowed: rlt.*"),
        ("rltx.Thing", "is not an allowed target; allowed: rlt.*"),
        ("rlt", "is not an allowed target; allowed: rlt.*"),
        ("rlt..config", "is not an allowed target; allowed: rlt.*"),
        ("rlt.llm.model_sources.importlib.import_module", "it is really importlib.import_module"),
        ("rlt.llm.model_sources.check_attention", "below rlt.* only classes are"),
        ("rlt.runs.files.write_json", "it is the program's own, no part of a run"),
        ("rlt.cli.main.main", "it is the program's own, no part of a run"),
        ("rlt.preflight.probe.StepClock", "it is the program's own, no part of a run"),
        ("rlt.stages.compare_jobs.CompareJobs", "it is the program's own, no part of a run"),
        ("rlt.runs.jobs.JobFailedError", "it is the program's own, no part of a run"),
        ("rlt.evaluation.graders.Sandbox", "it is really rlt.evaluation.sandbox.Sandbox"),
        ("rlt.llm.model_sources.Pretrained.load", "below rlt.* only classes are"),
        ("rlt.evaluation.worker.main", "it is the program's own, no part of a run"),
        ("rlt.llm.models.re.compile", "it is really re.compile"),
        ("lightning.pytorch.callbacks.model_checkpoint.os.system", "it is really posix.system"),
        ("torch.optim.sgd.torch.load", "it is really torch.serialization.load"),
        ("torch.optim.lr_scheduler.partial", "it is really functools.partial"),
        (
            "rlt.llm.model_sources.check_attention.__globals__",
            "names that start with _ are refused",
        ),
        ("rlt.llm.models._ready", "names that start with _ are refused"),
        ("transformers.get_scheduler.mro", "cannot be imported: transformers.get_scheduler has no"),
        ("rlt.llm.models", "is a module, not a class or a function"),
        ("rlt.llm.model_sources.ATTENTION", "is a tuple, not a class or a function"),
        (
            "rlt.training.algorithms.Algoritm",
            "rlt.training.algorithms has no 'Algoritm'; did you mean 'Algorithm'",
        ),
        ("rlt.trainig.RL", "rlt has no 'trainig'; did you mean 'training'"),
        ("torch.optim.swa_utils.get_ema_avg_fn", "below torch.optim.* only classes are"),
    ],
)
def test_targets_that_are_refused(target: str, reason: str) -> None:
    (error,) = check_targets(config({"deep": [{"er": {"_target_": target}}]}))
    assert error.startswith(f"deep[0].er._target_={target}: ") and reason in error


def test_the_environment_allows_more_and_says_so(allow: Callable[[str], None]) -> None:
    cfg = config({"a": {"_target_": "collections.Counter"}, "b": {"_target_": "fractions.gcd"}})
    errors = check_targets(cfg)
    assert len(errors) == 2
    assert errors[0].endswith("if you trust it, set RLT_ALLOW=collections.* in the environment")
    allow("collections.*, math.floor")
    (error,) = check_targets(cfg)
    assert error.startswith("b._target_=fractions.gcd: is not an allowed target")
    assert check_targets(config({"a": {"_target_": "math.floor"}})) == []
    allow("collections.*")
    (error,) = check_targets(config({"a": {"_target_": "collections.abc._sys.exit"}}))
    assert "names that start with _ are refused" in error


@pytest.mark.parametrize("value", ["*", "os.system()", "my package"])
def test_the_environment_allows_names_alone(allow: Callable[[str], None], value: str) -> None:
    allow(value)
    with pytest.raises(ConfigError, match="must be dotted names with commas"):
        check_targets(config({"a": {"_target_": ALGORITHM}}))


def test_a_target_must_be_a_name() -> None:
    (error,) = check_targets(config({"a": {"_target_": 3}}))
    assert error == "a._target_=3: must be a dotted name, e.g. rlt.module.Class"


def test_a_refused_target_is_not_even_imported(tmp_path: Path) -> None:
    (tmp_path / "hostile.py").write_text("raise SystemExit('imported')")
    script = (
        "from omegaconf import OmegaConf; from rlt.config.check import check_targets; import sys;"
        "print(len(check_targets(OmegaConf.create({'a': {'_target_': 'hostile.run'}}))));"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"},
    )
    assert result.stdout.split() == ["1", "False"]


def test_errors_are_raised_together_and_numbered() -> None:
    raise_if_any([])
    with pytest.raises(ConfigError) as caught:
        raise_if_any(["a: wrong", "b: too"])
    assert str(caught.value) == "the config has 2 errors:\n  1. a: wrong\n  2. b: too"
    assert isinstance(caught.value, ValueError)
