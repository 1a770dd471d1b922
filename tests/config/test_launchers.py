"""What a config may tell the launchers of other packages."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from rlt.config.allowed_targets import allowed_by_user
from rlt.config.hydra_guard import check_hydra_node
from rlt.config.launchers import check_launcher
from tests.config.nodes import SLURM, config


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
