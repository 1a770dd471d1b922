"""What is built from a config is what was checked, with the values of the call."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from rlt.config.allowed_targets import ConfigError
from rlt.config.build import build, build_partial, stage_class
from rlt.config.compose import config_dir
from tests.config.nodes import ALGORITHM, config


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


def test_a_default_stands_in_yaml_alone(composed: Callable[..., DictConfig]) -> None:
    """The keys of a stage have no default in its class, and a value or a group in its YAML."""
    for file in sorted((config_dir() / "stage").glob("*.yaml")):
        cfg = composed(f"stage={file.stem}")
        listed = [one for one in OmegaConf.load(file).defaults if isinstance(one, DictConfig)]
        names = [str(next(iter(one))).removeprefix("/") for one in listed]
        groups = {name.partition("@")[2] or name for name in names}
        for field in dataclasses.fields(stage_class(cfg)):
            assert field.default is field.default_factory is dataclasses.MISSING, field.name
            assert field.name in cfg or field.name in groups, (file.stem, field.name)
