"""Typos, hostile targets and missing values in a config are all found, together, and named."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from rlt.cli import hydra_app
from rlt.cli.resume import resume
from rlt.config.allowed_targets import ConfigError, allowed_by_user, raise_if_any
from rlt.config.build import build, build_partial
from rlt.config.check import check_targets
from rlt.config.compose import check_search_path
from rlt.config.hydra_guard import check_hydra_node
from rlt.config.launchers import check_launcher
from rlt.config.suggestions import explain_struct_error, nearest

ALGORITHM = "rlt.training.algorithms.Algorithm"
SLURM = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"


def config(content: Any) -> DictConfig:
    cfg = OmegaConf.create(content)
    assert isinstance(cfg, DictConfig)
    return cfg


# --- keys of a signature ------------------------------------------------------------------------


def test_a_correct_config_has_no_errors_though_arguments_are_absent() -> None:
    cfg = config(
        {
            "algorithm": {"_target_": ALGORITHM, "beta": 0.1, "_convert_": "all"},
            "optim": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 1e-3},
            "schedule": {"_target_": "transformers.get_scheduler", "_partial_": True},
            "trainer": {"_target_": "lightning.pytorch.Trainer", "max_steps": 3},
            "callbacks": {
                "a": {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint"},
                "b": None,
            },
            "plain": {"anything": [1, {"at": "all"}], "null": None},
        }
    )
    assert check_targets(cfg) == []


def test_typos_are_found_beside_a_target_nested_and_in_lists_all_at_once() -> None:
    cfg = config(
        {
            "algorithm": {"_target_": ALGORITHM, "epsilon_hi": 0.2},
            "a": {"b": {"_target_": "torch.optim.AdamW", "weight_decai": 0.1}},
            "t": {
                "_target_": "lightning.pytorch.Trainer",
                "callbacks": [
                    {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "x"},
                    {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitr": "x"},
                ],
            },
        }
    )
    errors = check_targets(cfg)
    assert len(errors) == 3
    assert errors[0].startswith(
        f"algorithm.epsilon_hi: {ALGORITHM} has no parameter 'epsilon_hi'; did you mean "
        "'epsilon_high'"
    )
    assert "accepted: aggregation, objective, ratio, epsilon_low, epsilon_high" in errors[0]
    assert errors[1].startswith("a.b.weight_decai: torch.optim.AdamW has no parameter")
    assert "did you mean 'weight_decay'" in errors[1]
    assert errors[2].startswith("t.callbacks[1].monitr: ")
    assert "did you mean 'monitor'" in errors[2]


def test_a_name_that_resembles_nothing_gets_the_list_alone() -> None:
    (error,) = check_targets(config({"a": {"_target_": ALGORITHM, "zzz": 1}}))
    assert "did you mean" not in error and "accepted: aggregation" in error


def test_any_key_is_accepted_only_where_the_signature_takes_any() -> None:
    logger = "lightning.pytorch.loggers.TensorBoardLogger"  # has **kwargs
    assert check_targets(config({"a": {"_target_": logger, "flush_secs": 1}})) == []
    assert check_targets(config({"a": {"_target_": ALGORITHM, "flush_secs": 1}})) != []
    (error,) = check_targets(config({"a": {"_target_": logger, "nam": 1}}))
    assert "did you mean 'name'" in error  # the logger would pass it on to its writer
    assert check_targets(config({"a": {"_target_": logger, "log_dir_suffix": 1}})) == []
    grader = "rlt.evaluation.graders.ExactGrader"  # a protocol's signature takes any
    (error,) = check_targets(config({"a": {"_target_": grader, "foo": 1}}))
    assert error.startswith("a.foo: ")


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("datamodule", "seed"),
        ("logger", "save_dir"),
        ("teacher_rl.module", "gradient_checkpointing"),
        ("trainer", "default_root_dir"),
    ],
)
def test_what_the_program_sets_itself_is_no_key(part: str, key: str) -> None:
    targets = {
        "datamodule": "rlt.data.batches.StepDataModule",
        "logger": "lightning.pytorch.loggers.TensorBoardLogger",
        "teacher_rl.module": "rlt.training.rl.RL",
        "trainer": "lightning.pytorch.Trainer",
    }
    cfg = OmegaConf.create()
    OmegaConf.update(cfg, part, {"_target_": targets[part], key: 1})
    assert check_targets(cfg) == [f"{part}.{key}: the program sets it itself; leave it out"]


def test_a_part_without_a_value_is_told_beside_the_others() -> None:
    errors = check_targets(config({"callbacks": {"x": "???", "y": {"every": 1}}}))
    assert {error.partition(":")[0] for error in errors} == {"callbacks.x", "callbacks.y"}


@pytest.mark.parametrize("key", ["_partail_", "_convret_"])
def test_misspelt_hydra_keys(key: str) -> None:
    (error,) = check_targets(
        config({"a": {"_target_": "lightning.pytorch.loggers.TensorBoardLogger", key: True}})
    )
    assert error.startswith(f"a.{key}: no such Hydra key; did you mean '_")


def test_misspelt_target_key() -> None:
    (error,) = check_targets(config({"a": {"_traget_": "os.system", "command": "ls"}}))
    assert error == "a._traget_: no such Hydra key; did you mean '_target_'?"


def test_a_target_that_a_reference_carries_is_checked_once_under_its_own_path() -> None:
    cfg = config({"a": {"copy": "${z}"}, "z": {"_target_": ALGORITHM, "bteta": 1}})
    (error,) = check_targets(cfg)
    assert error.startswith("z.bteta: ")


@pytest.mark.parametrize("text", ["oc.create:'{_target_: os.system}'", "oc.decode:'{x: 1}'"])
def test_a_mapping_that_a_resolver_makes_is_refused(text: str) -> None:
    """It is made anew whenever it is looked at, out of an environment that may have changed."""
    errors = check_targets(config({"a": [{"b": f"${{{text}}}"}]}))
    assert errors[0].startswith(f"a[0].b=${{{text}}}: a resolver may give a plain value")
    assert check_targets(config({"a": "${oc.decode:'3'}", "b": "${a}"})) == []


@pytest.mark.parametrize("text", ["${${x}:'{a: 1}'}", "${a.b:${oc.${x}:3}}", "${oc.${x}:'3'}"])
def test_a_resolver_whose_name_is_computed_is_refused(text: str) -> None:
    errors = check_targets(config({"x": "decode", "a": [text]}))
    assert f"a[0]={text}: the name of a resolver must be written out" in errors


def test_a_reference_whose_name_is_computed_passes() -> None:
    cfg = config({"x": "y", "z": {"y": {"v": 3}}, "a": "${z.${x}}", "b": "${oc.env:NO,${x}:${x}}"})
    assert check_targets(cfg) == []


def test_text_that_would_be_resolved_once_more_is_refused() -> None:
    text = "\\${oc.create:{_target_: os.system, command: ls}}"
    (error,) = check_targets(config({"a": text}))
    assert error == f"a={text}: must not give another interpolation"


def test_what_is_built_is_what_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpolations that give something else at a second look, as an environment may have it."""
    built: list[str] = []
    monkeypatch.setattr("collections.Counter", lambda **_: built.append("Counter"))
    made = "{_target_: collections.Counter}"
    monkeypatch.setenv("NAME", "oc.create")
    for text in (
        f"${{oc.create:'{made}'}}",
        f"${{${{oc.env:NAME}}:'{made}'}}",
        f"\\${{oc.create:'{made}'}}",
        "${other}",
    ):
        cfg = config({"a": {"_target_": ALGORITHM, "beta": text}})
        cfg.other = OmegaConf.create(made)
        with pytest.raises(ConfigError, match=r"a\.beta"):
            build(cfg.a)
    cfg = config({"a": {"_target_": "${x}", "beta": 1}, "x": "collections.Counter"})
    with pytest.raises(ConfigError, match=r"a\._target_=collections\.Counter: is not"):
        build(cfg.a)
    assert not built


def test_values_that_are_passed_in_the_call_may_be_missing() -> None:
    node = {"_target_": "torch.optim.SGD", "lr": "???", "momentum": "${nothing}"}
    cfg = config({"a": node, "nothing": "???"})
    OmegaConf.set_readonly(cfg, True)
    weights = [torch.nn.Parameter(torch.zeros(2))]
    made = build(cfg.a, params=weights, lr=0.5, momentum=0.3)
    assert (made.defaults["lr"], made.defaults["momentum"]) == (0.5, 0.3)
    assert build_partial(cfg.a)(weights, lr=1.0, momentum=0.3).defaults["lr"] == 1.0


def test_a_target_is_written_out() -> None:
    (error,) = check_targets(config({"x": ALGORITHM, "a": {"_target_": "${x}"}}))
    assert error == "a._target_: must be written out, not be an interpolation"


def test_references_in_a_circle_end() -> None:
    cfg = config({"a": {"b": "${c}"}, "c": {"d": "${a}"}})
    assert check_targets(cfg) == []


# --- targets ------------------------------------------------------------------------------------


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
        ("rlt.llm.models.importlib.import_module", "it is really importlib.import_module"),
        ("rlt.llm.models.check_attention", "below rlt.* only classes are"),
        ("rlt.runs.files.write_json", "it is the program's own, no part of a run"),
        ("rlt.cli.main.main", "it is the program's own, no part of a run"),
        ("rlt.preflight.probe.StepClock", "it is the program's own, no part of a run"),
        ("rlt.sweeps.compare_jobs.CompareJobs", "it is the program's own, no part of a run"),
        ("rlt.runs.jobs.JobFailedError", "it is the program's own, no part of a run"),
        ("rlt.evaluation.graders.Sandbox", "it is really rlt.evaluation.sandbox.Sandbox"),
        ("rlt.llm.models.Pretrained.load", "below rlt.* only classes are"),
        ("rlt.evaluation.worker.main", "it is the program's own, no part of a run"),
        ("rlt.llm.models.re.compile", "it is really re.compile"),
        ("lightning.pytorch.callbacks.model_checkpoint.os.system", "it is really posix.system"),
        ("torch.optim.sgd.torch.load", "it is really torch.serialization.load"),
        ("torch.optim.lr_scheduler.partial", "it is really functools.partial"),
        ("rlt.llm.models.check_attention.__globals__", "names that start with _ are refused"),
        ("rlt.llm.models._ready", "names that start with _ are refused"),
        ("transformers.get_scheduler.mro", "cannot be imported: transformers.get_scheduler has no"),
        ("rlt.llm.models", "is a module, not a class or a function"),
        ("rlt.llm.models.ATTENTION", "is a tuple, not a class or a function"),
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


@pytest.fixture
def allow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """`allow("my.*")`: a process started with RLT_ALLOW=my.*"""

    def start(value: str) -> None:
        monkeypatch.setenv("RLT_ALLOW", value)
        allowed_by_user.cache_clear()

    yield start
    allowed_by_user.cache_clear()


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


# --- values -------------------------------------------------------------------------------------


def test_missing_values_are_named_wherever_they_are() -> None:
    cfg = config(
        {
            "path": "???",
            "a": {"_target_": ALGORITHM, "beta": "???", "typo": 1},
            "list": [1, "???"],
            "b": {"_target_": "???"},
        }
    )
    errors = check_targets(cfg)
    names = [error.partition(":")[0] for error in errors]
    assert names == ["path", "a.typo", "a.beta", "list[1]", "b._target_"]
    assert errors[0] == "path: has no value (???); set it, e.g. path=… on the command line"


def test_only_the_given_part_is_checked_for_missing_values() -> None:
    cfg = config({"used": {"x": "${other.y}"}, "other": {"y": 1, "z": "???"}})
    assert check_targets(cfg.used) == []


def test_an_interpolation_that_leads_nowhere_is_named() -> None:
    (error,) = check_targets(config({"a": {"b": "${nowhere}"}}))
    assert error.startswith("a.b: cannot be resolved: Interpolation key 'nowhere' not found")


def test_errors_are_raised_together_and_numbered() -> None:
    raise_if_any([])
    with pytest.raises(ConfigError) as caught:
        raise_if_any(["a: wrong", "b: too"])
    assert str(caught.value) == "the config has 2 errors:\n  1. a: wrong\n  2. b: too"
    assert isinstance(caught.value, ValueError)


def test_keys_that_neither_every_run_nor_its_stage_has() -> None:
    compare = {"_target_": "rlt.stages.compare.Compare", "stage": "compare", "note": None}
    (error,) = check_targets(config(compare | {"seed": 1, "sed": 2}))
    assert error.startswith("sed: no such key; did you mean 'seed'?; valid: accept_changes, ")


def test_a_config_without_a_stage() -> None:
    (error,) = check_targets(config({"stage": "compare"}))
    assert error == (
        "this config names no stage: its key _target_ is missing. Choose one by stage=…"
    )


# --- the hydra node -----------------------------------------------------------------------------


@dataclass
class Root:
    seed: int = 0
    reward: Any = None
    experiment: Any = None
    extra: list[int] = field(default_factory=list)


@pytest.fixture
def conf(tmp_path: Path) -> Iterator[Path]:
    files = {
        "config.yaml": "defaults: [test_checks_schema, reward: rlt, _self_, experiment: null]",
        "reward/rlt.yaml": "alpha: 1",
        "experiment/bad.yaml": "# @package _global_\nrewrad: {alpha: 1}",
        "experiment/worse.yaml": "# @package _global_\ndefaults: [override /rewrad: rlt]",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    store = ConfigStore.instance()
    before = dict(store.repo)
    store.store("test_checks_schema", Root)
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        yield tmp_path
    GlobalHydra.instance().clear()
    store.repo = before


def hydra_node(*overrides: str) -> DictConfig:
    overrides = ("hydra.output_subdir=null", *overrides)  # as in conf/config.yaml
    node = compose("config", list(overrides), return_hydra_config=True).hydra
    assert isinstance(node, DictConfig)
    return node


@pytest.mark.usefixtures("conf")
@pytest.mark.parametrize("job_logging", ["default", "disabled", "none", "stdout"])
def test_hydras_own_settings_pass(job_logging: str) -> None:
    assert check_hydra_node(hydra_node(f"hydra/job_logging={job_logging}")) == []
    callback = "hydra.experimental.callbacks.PickleJobInfoCallback"
    assert check_hydra_node(hydra_node(f"+hydra.callbacks.x._target_={callback}")) == []
    assert check_hydra_node(hydra_node("+hydra.job.env_set.OMP_NUM_THREADS=2")) == []


@pytest.mark.usefixtures("conf")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "+hydra.callbacks.x={_target_: os.system, command: ls}",
            "hydra.callbacks.x._target_=os.system: is not an allowed target",
        ),
        (
            "hydra.launcher._target_=subprocess.Popen",
            "hydra.launcher._target_=subprocess.Popen: is not an allowed target",
        ),
        (
            "+hydra.callbacks.x={_target_: hydra.experimental.callbacks.LogJobReturnCallback,y: 1}",
            "hydra.callbacks.x.y: hydra.experimental.callbacks.LogJobReturnCallback has no param",
        ),
        (
            "hydra.job_logging.handlers.console.class=logging.handlers.SocketHandler",
            "hydra.job_logging.handlers.console.class=logging.handlers.SocketHandler: is not",
        ),
        (
            "hydra.hydra_logging.handlers.console.stream='ext://hostile.module'",
            "hydra.hydra_logging.handlers.console.stream=ext://hostile.module: is not allowed",
        ),
        (
            "hydra.job_logging.handlers.console.class=${oc.env:NOT_SET,logging.NullHandler}",
            "hydra.job_logging.handlers.console.class=${oc.env:NOT_SET,logging.NullHandler}:",
        ),
        (
            "hydra.launcher._target_=hydra_plugins.some_launcher.Launcher",
            "hydra.launcher._target_=hydra_plugins.some_launcher.Launcher: is not an allowed",
        ),
        (
            "+hydra.job.env_set.RLT_ALLOW=os.*",
            "hydra.job.env_set.RLT_ALLOW: this environment variable may not be set",
        ),
        (
            "+hydra.job.env_set.LD_PRELOAD=/tmp/hostile.so",
            "hydra.job.env_set.LD_PRELOAD: this environment variable may not be set",
        ),
    ],
)
def test_code_in_the_hydra_node_is_refused(override: str, message: str) -> None:
    (error,) = check_hydra_node(hydra_node(override))
    assert error.startswith(message)


@pytest.mark.parametrize(
    ("node", "where"),
    [
        ({"callbacks": {"x": "${oc.select:logger.${now:evil}}"}}, "callbacks.x"),
        ({"callbacks": "${oc.select:logger}"}, "callbacks"),
        ({"sweeper": {"params": "${oc.select:a.${hydra.mode}}"}}, "sweeper.params"),
        (
            {"job_logging": {"handlers": {"console": {"stream": "${now:ext}://evil.module"}}}},
            "job_logging.handlers.console.stream",
        ),
        ({"hydra_logging": {"root": {"handlers": ["${now:x}"]}}}, "hydra_logging.root.handlers[0]"),
        ({"launcher": {"setup": "${oc.select:a.${now:cmds}}"}}, "launcher.setup"),
        ({"job": {"env_set": "${oc.select:a.${now:cmds}}"}}, "job.env_set"),
        ({"job": {"env_set": "${sweep.more}"}, "sweep": {"more": {}}}, "job.env_set"),
        ({"sweep": {"more": {}}, "job": "${sweep.more}"}, "job"),
    ],
)
def test_what_hydra_builds_is_written_out(node: dict[str, Any], where: str) -> None:
    errors = check_hydra_node(config(node))
    assert errors[0].startswith(f"hydra.{where}=") and "must be written out" in errors[0]


@pytest.mark.parametrize(
    "node",
    [
        {"callbacks": {"x": {"folder": "${output_dir}"}}},
        {"job": {"env_set": {"CUDA_VISIBLE_DEVICES": "${hydra.job.num}"}}},
        {"launcher": {"_target_": SLURM, "name": "${hydra.job.name}"}},
    ],
)
def test_typed_values_need_not_be_written_out(node: dict[str, Any]) -> None:
    assert check_hydra_node(config(node)) == []


@pytest.mark.usefixtures("conf")
@pytest.mark.parametrize("written", [".", "${hydra.runtime.output_dir}"])
def test_hydra_writes_no_config_of_its_own(written: str) -> None:
    (error,) = check_hydra_node(hydra_node(f"hydra.output_subdir={written}"))
    assert error.startswith(f"hydra.output_subdir={written}: must stay null")


@pytest.mark.usefixtures("conf")
def test_a_log_file_is_not_emptied() -> None:
    (error,) = check_hydra_node(hydra_node("+hydra.job_logging.handlers.file.mode=w"))
    assert error.startswith("hydra.job_logging.handlers.file.mode: a log file is only added to")


@pytest.mark.parametrize(
    "key",
    ["hydra.job_logging.x", "+hydra.callbacks.x", "hydra/launcher", "+evil@hydra.job_logging"],
)
def test_a_sweep_over_hydras_own_settings_is_refused(key: str) -> None:
    (error,) = check_hydra_node(config({"sweeper": {"params": {key: "a,b", "seed": "1,2"}}}))
    assert error.startswith(f"hydra.sweeper.params.{key}: Hydra's own settings may not be swept")


def test_a_logging_factory_is_refused() -> None:
    cfg = config({"job_logging": {"handlers": {"x": {"()": "os.system", "command": "ls"}}}})
    (error,) = check_hydra_node(cfg)
    assert error.startswith("hydra.job_logging.handlers.x.()=os.system: is not allowed here")


@pytest.mark.usefixtures("conf")
@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("${hydra.sweep.dir}/logs/more.log", True),
        ("${hydra.runtime.output_dir}/${hydra.job.name}-2.log", True),
        ("/home/me/.bashrc", False),
        ("more.log", False),
        ("${hydra.runtime.output_dir}/../../more.log", False),
        ("${hydra.runtime.output_dir}/sitecustomize.py", False),
        ("${hydra.runtime.output_dir}/${hydra.job.id}.log", False),
        ("${hydra.runtime.output_dir}${oc.env:HOME}/more.log", False),
        ("${hydra.runtime.output_dir}/more.log\n", False),
    ],
)
@pytest.mark.parametrize("key", ["class", "()"])
def test_a_log_file_lies_in_the_runs_folder(name: str, allowed: bool, key: str) -> None:
    node = hydra_node()
    OmegaConf.set_struct(node, False)
    node.job_logging.handlers.file = {key: "logging.FileHandler", "filename": name, "delay": True}
    errors = check_hydra_node(node)
    assert allowed == (errors == [])
    assert allowed or errors[0].startswith("hydra.job_logging.handlers.file.filename=")


@pytest.mark.usefixtures("conf")
def test_a_log_file_is_not_moved_by_other_means() -> None:
    for name in ("../../x", "../${hydra.runtime.output_dir}"):
        (error,) = check_hydra_node(hydra_node(f"hydra.job.name={name}"))
        assert error.startswith(f"hydra.job.name={name}: a log file is named so")
    node = hydra_node()
    OmegaConf.set_struct(node, False)
    node.job_logging.handlers.file["."] = {"baseFilename": "/home/me/.bashrc"}
    assert check_hydra_node(node) == ["hydra.job_logging.handlers.file['.']: is not allowed here"]
    node = hydra_node()
    OmegaConf.set_struct(node, False)
    node.env = {"x": {"class": "logging.FileHandler", "filename": "/home/me/.bashrc"}}
    node.job_logging.handlers.more = "${hydra.env.x}"
    written_out, error, unknown = check_hydra_node(node)
    assert unknown.startswith("hydra.env=") and "must stay {}; leave it out" in unknown
    assert "handlers.more=${hydra.env.x}: must be written out" in written_out
    assert error.startswith("hydra.job_logging.handlers.more.filename=/home/me/.bashrc: ")


# --- errors of the composition ------------------------------------------------------------------


@pytest.mark.usefixtures("conf")
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rewrad.alpha=1", "no such key 'rewrad'; did you mean 'reward'?"),
        ("rewrad=rlt", "no such key 'rewrad'; did you mean 'reward'?"),
        ("reward.alhpa=1", "no such key 'reward.alhpa'; did you mean 'alpha'?"),
        ("~rewrad", "no such key 'rewrad'; did you mean 'reward'?"),
        ("experiment=bad", "experiment/bad: no such key 'rewrad'; did you mean 'reward'?"),
        (
            "experiment=worse",
            "experiment/worse: rewrad: this config has no such part; did you mean 'reward'?; "
            "it has: experiment, reward",
        ),
        ("reward=rtl", "reward=rtl: no such option; did you mean 'rlt'?; available: rlt"),
        (
            "seed=x",
            "Error merging override seed=x: Value 'x' of type 'str' could not be converted to "
            "Integer full_key: seed object_type=Root",
        ),
    ],
)
def test_composition_errors_become_one_line(override: str, expected: str) -> None:
    with pytest.raises(Exception) as caught:
        compose("config", [override])
    assert explain_struct_error(caught.value, ["seed"], ["reward", "experiment"]) == expected


def test_struct_errors_of_omegaconf_itself() -> None:
    cfg = config({"reward": {"alpha": 1}})
    OmegaConf.set_struct(cfg, True)
    with pytest.raises(AttributeError) as caught:
        _ = cfg.rewrad
    assert explain_struct_error(caught.value) == "no such key 'rewrad'; did you mean 'reward'?"


def test_nearest_names() -> None:
    names = ["reward", "rewards", "forward", "seed", "Reward2"]
    assert nearest("rewrad", names) == ["reward", "rewards", "Reward2"]
    assert nearest("rewrad", names, n=1) == ["reward"]
    assert nearest("SEED", names) == ["seed"]
    assert nearest("xyz", names) == []


# --- launchers of other packages ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"setup": ["touch hostile"]}, "hydra.launcher.setup: may not be set from a config"),
        ({"srun_args": ["--x"]}, "hydra.launcher.srun_args: may not be set from a config"),
        ({"python": "/tmp/evil"}, "hydra.launcher.python: may not be set from a config"),
        ({"partition": "gpu\ntouch hostile"}, "has a character that a shell might act on"),
        ({"submitit_folder": "${bad}/%j"}, "has a character that a shell might act on"),
        ({"partition": "${shell}"}, "partition=${shell}: must be written out"),
        ({"partition": "a${shell}"}, "partition=a${shell}: must be written out"),
        ({"partition": ["gpu; touch hostile"]}, "must be one value, text or a number"),
        ({"partiton": "gpu"}, "did you mean 'partition'?"),
    ],
)
def test_what_a_launcher_may_not_be_told(values: dict[str, Any], message: str) -> None:
    launcher = {"_target_": SLURM, "partition": "gpu"} | values
    node = {"launcher": launcher, "bad": "x\ntouch hostile", "shell": "gpu; touch hostile"}
    errors = check_hydra_node(config(node))
    assert message in errors[0], errors


def test_the_folder_of_a_launcher_may_have_any_name_in_one_line() -> None:
    launcher = {"_target_": SLURM, "submitit_folder": "${sweep.dir}/.submitit/%j"}
    node = config({"launcher": launcher, "sweep": {"dir": "it's & more"}})
    assert check_hydra_node(node) == []


def test_a_config_does_not_choose_a_ray_cluster() -> None:
    target = "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher"
    node = {"_target_": target, "ray": {"init": {"address": "ray://evil:10001", "num_cpus": 2}}}
    (error,) = check_launcher(config(node))
    assert error.startswith("hydra.launcher.ray.init.address: may not be set from a config")
    file = Path(__file__).parents[2] / "conf" / "hydra" / "launcher" / "ray_cluster.yaml"
    assert check_launcher(config(OmegaConf.load(file))) == []


def test_a_launcher_that_the_user_trusts(monkeypatch: pytest.MonkeyPatch) -> None:
    node = config({"launcher": {"_target_": SLURM, "setup": ["module load cuda"]}})
    assert "RLT_ALLOW=hydra_plugins.hydra_submitit_launcher" in check_hydra_node(node)[0]
    monkeypatch.setenv("RLT_ALLOW", SLURM)
    allowed_by_user.cache_clear()
    try:
        assert check_hydra_node(node) == []
    finally:
        monkeypatch.delenv("RLT_ALLOW")
        allowed_by_user.cache_clear()


def test_a_launcher_that_is_not_installed_names_its_extra() -> None:
    if importlib.util.find_spec("ray"):
        pytest.skip("it is installed here")
    target = "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher"
    (error,) = check_hydra_node(config({"launcher": {"_target_": target}}))
    assert "is not installed: pip install 'rlt[ray]'" in error


# --- what would run code before anything is composed --------------------------------------------


def test_hydras_rerun_from_a_pickle_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["rlt", "--experimental-rerun=x.pickle"])
    with pytest.raises(ValueError, match="--experimental-rerun: it would unpickle"):
        hydra_app.compose_and_run()


@pytest.fixture
def resumed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, list[str]], list[str]]:
    """`resumed(folder, overrides)`: what the program is told when that sweep goes on."""

    def resume_sweep(folder: Path, overrides: list[str]) -> list[str]:
        told: list[str] = []
        monkeypatch.setattr(sys, "argv", ["rlt"])
        monkeypatch.setattr("rlt.cli.hydra_app.compose_and_run", lambda: told.extend(sys.argv[1:]))
        monkeypatch.chdir(Path.cwd())  # where this test began is restored
        folder.mkdir()
        hydra = {
            "overrides": {"hydra": ["hydra.mode=MULTIRUN"], "task": overrides},
            "runtime": {"cwd": str(folder), "config_sources": []},
        }
        OmegaConf.save({"hydra": hydra}, folder / "multirun.yaml")
        resume(folder, [])
        return told

    return resume_sweep


@pytest.mark.parametrize(
    "entry", ["--experimental-rerun=x.pickle", "-cd=x", " --cfg", "no override"]
)
def test_a_saved_sweep_gives_overrides_alone(
    entry: str, resumed: Callable[[Path, list[str]], list[str]], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="is no override"):
        resumed(tmp_path / "sweep", ["seed=0,1", entry])


@pytest.mark.parametrize("name", ["plain", "a,b", "it's (1)", "tail\\", "a\\'b=c d"])
def test_a_sweep_goes_on_in_a_folder_of_any_name(
    name: str, resumed: Callable[[Path, list[str]], list[str]], tmp_path: Path
) -> None:
    told = resumed(tmp_path / name, ["seed=0,1", "++output_dir=x", "~note"])
    assert told[:-1] == ["hydra.mode=MULTIRUN", "seed=0,1", "~note"]
    (override,) = OverridesParser.create().parse_overrides(told[-1:])
    assert override.key_or_group == "output_dir" and not override.is_sweep_override()
    assert override.value() == str(tmp_path / name)


@pytest.mark.parametrize("place", ["pkg://hostile_package", "pkg://hostile_package/conf"])
@pytest.mark.parametrize("where", ["command line", "added", "primary config", "config path"])
def test_a_package_is_not_imported_for_its_configs(
    place: str,
    where: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    allow: Callable[[str], None],
) -> None:
    (tmp_path / "hostile_package" / "conf").mkdir(parents=True)
    (tmp_path / "hostile_package" / "__init__.py").touch()
    (tmp_path / "mine.yaml").write_text(f"defaults: [config]\nhydra: {{searchpath: ['{place}']}}")
    monkeypatch.syspath_prepend(tmp_path)
    arguments = {
        "command line": [f"hydra.searchpath=[{place}]"],
        "added": [f"+hydra.searchpath=[{place}]"],
        "primary config": [f"--config-dir={tmp_path}", "--config-name=mine"],
        "config path": [f"--config-path={place}"],
    }[where]
    monkeypatch.setattr(sys, "argv", ["rlt", *arguments])
    with pytest.raises(ValueError, match="give the folder, file:///path/to/configs, or set RLT_A"):
        hydra_app.compose_and_run()
    assert "hostile_package" not in sys.modules
    allow("hostile_package.*")
    check_search_path([place, f"file://{tmp_path}"])
