"""Settings of an algorithm: which are refused, and those that are shipped."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from tests.training.fitting import GRPO, PAPER

CONF = Path(__file__).parents[2] / "conf"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"aggregation": "mean"},
            r"algorithm.aggregation='mean', but it must be one of sequence_mean, ",
        ),
        ({"objective": "ppo"}, r"algorithm.objective='ppo', but it must be one of clip, cispo"),
        ({"ratio": "word"}, r"algorithm.ratio='word', but it must be one of token, sequence"),
        ({"epsilon_low": 1.0}, r"algorithm.epsilon_low=1.0, but it must be in \[0, 1\)"),
        ({"epsilon_low": None}, r"algorithm.epsilon_low=None, but it must be in"),
        ({"epsilon_high": -0.1}, r"algorithm.epsilon_high=-0.1, but it must be at least 0"),
        ({"beta": -1.0}, r"algorithm.beta=-1.0, but it must be at least 0"),
        ({"beta": math.nan}, r"algorithm.beta=nan"),
        (
            {"scale_rewards": "none"},
            r"algorithm.scale_rewards='none', but it must be true or false",
        ),
        (
            {"num_iterations": 0},
            r"algorithm.num_iterations=0, but it must be a whole number of at least 1",
        ),
        ({"minibatches": 1.5}, r"algorithm.minibatches=1.5, but it must be a whole number"),
        ({"reference_update_every_steps": 0}, r"algorithm.reference_update_every_steps=0"),
        ({"reference_mix_up": 0.0}, r"algorithm.reference_mix_up=0.0, but it must be in \(0, 1\]"),
        (
            {"objective": "cispo"},
            r"algorithm.epsilon_low=0.2, but it must be null: objective=cispo",
        ),
        (
            {"objective": "cispo", "epsilon_low": None},
            r"epsilon_high=0.2, but it must be at least 1: it is the cap",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(GRPO, **change)


def test_what_a_setting_asks_of_its_caller() -> None:
    assert not GRPO.needs_reference and not GRPO.needs_old_log_probs
    busy = replace(GRPO, beta=0.04, num_iterations=2, minibatches=3)
    assert busy.needs_reference and busy.needs_old_log_probs
    assert busy.optimizer_steps_per_rollout == 6


CONFIGS = {
    "grpo": PAPER,
    "dr_grpo": replace(PAPER, aggregation="max_length", scale_rewards=False, beta=0.0),
    "bnpo": replace(PAPER, aggregation="token_mean"),
    "dapo": replace(
        PAPER, aggregation="token_mean", epsilon_high=0.28, beta=0.0, mask_overlong=True
    ),
    "gspo": replace(PAPER, ratio="sequence", epsilon_low=3e-4, epsilon_high=4e-4, beta=0.0),
    "cispo": replace(
        PAPER, aggregation="token_mean", objective="cispo", epsilon_low=None, epsilon_high=5.0,
        beta=0.0,
    ),
}  # fmt: skip


def test_every_file_of_the_group_is_tested() -> None:
    assert {path.stem for path in (CONF / "algorithm").glob("*.yaml")} == set(CONFIGS)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_shipped_settings(name: str) -> None:
    with initialize_config_dir(str(CONF / "algorithm"), version_base="1.3"):
        assert instantiate(compose(name)) == CONFIGS[name]
