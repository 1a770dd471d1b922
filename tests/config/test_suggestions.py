"""Errors of the composition become one line that names what was probably meant."""

import pytest
from hydra import compose
from hydra.errors import HydraException
from omegaconf import OmegaConf

from rlt.config.suggestions import explain_struct_error, nearest
from tests.config.nodes import config


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
    with pytest.raises(HydraException) as caught:
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
