"""Hydra's own node may not name code, other files or variables of the environment."""

from typing import Any

import pytest
from hydra import compose
from omegaconf import DictConfig, OmegaConf

from rlt.config.hydra_guard import check_hydra_node
from tests.config.nodes import SLURM, config


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
