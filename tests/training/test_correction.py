"""Importance weights where the sampler's probabilities are not the policy's."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from rlt.data.problem import make_problem
from rlt.sampling import Completion
from rlt.training.correction import importance_weights, mismatch, sampler_ratios
from rlt.training.rl_loss import TokenWeights, token_weights
from rlt.training.rollout_batch import ParsedCompletion, RolloutBatch
from tests.training.fitting import GRPO

RATIO = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0])


@pytest.mark.parametrize(
    ("correction", "weights"),
    [
        ("none", [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("tis", [0.25, 0.5, 1.0, 2.0, 2.0]),
        ("mis", [0.0, 0.5, 1.0, 2.0, 0.0]),
    ],
)
def test_weights_by_hand(correction: Any, weights: list[float]) -> None:
    assert importance_weights(RATIO, correction, cap=2.0).tolist() == weights


def test_mismatch_by_hand() -> None:
    values = mismatch([RATIO[:2], RATIO[2:]], cap=2.0)
    expected = [w - 1 - math.log(w) for w in RATIO.tolist()]
    assert values["kl"] == pytest.approx(sum(expected) / 5)
    assert values["max_ratio"] == 4.0
    assert values["outside_rate"] == 0.4


def test_corrected_mean_is_the_policys_own() -> None:
    """Of a function of tokens that a sampler has drawn with other probabilities."""
    generator = torch.Generator().manual_seed(0)
    policy_V = torch.tensor([0.5, 0.3, 0.2])
    sampler_V = torch.tensor([0.4, 0.4, 0.2])
    value_V = torch.tensor([1.0, -2.0, 5.0])
    drawn_N = torch.multinomial(sampler_V, 200_000, replacement=True, generator=generator)
    (ratio_N,) = sampler_ratios([policy_V.log()[drawn_N]], [sampler_V.log()[drawn_N]])
    weights_N = importance_weights(ratio_N, "tis", cap=2.0)
    assert float((weights_N * value_V[drawn_N]).mean()) == pytest.approx(0.9, abs=0.03)
    assert float(value_V[drawn_N].mean()) == pytest.approx(0.6, abs=0.03)


def sampled(own: list[list[float]], sampler: list[list[float]]) -> RolloutBatch:
    """Two completions with the policy's and the sampler's log-probs."""
    completions = [Completion([7] * len(s), s, "stop", exact=False) for s in sampler]
    rollout = RolloutBatch.of_groups(
        [make_problem("q", "s")],
        [[1]],
        [completions],
        lambda ids: ParsedCompletion(ids, "", "", True),
    )
    rollout.log_probs = [torch.tensor(values) for values in own]
    return rollout


def weights_of(correction: Any, aggregation: Any = "token_mean") -> TokenWeights:
    log = [math.log(w) for w in RATIO.tolist()]
    rollout = sampled([log[:2], log[2:]], [[0.0, 0.0], [0.0, 0.0, 0.0]])
    settings = replace(GRPO, correction=correction, aggregation=aggregation)
    rollout.compare_with_sampler(settings.correction)
    return token_weights(rollout, [0, 1], settings, 3)


def test_loss_weights() -> None:
    weights = weights_of("tis")
    assert weights.mask_BT.tolist() == [[True, True, False], [True, True, True]]
    expected = torch.tensor([[0.25, 0.5, 0.0], [1.0, 2.0, 2.0]]) / 5
    assert torch.allclose(weights.policy_BT, expected)


@pytest.mark.parametrize("correction", ["none", "tis", "mis"])
def test_an_exact_kl_is_not_corrected(correction: str) -> None:
    """It is the same whichever token was drawn."""
    expected = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]) / 5
    assert torch.allclose(weights_of(correction).exact_kl_BT, expected)


def test_tokens_share_no_ratio() -> None:
    with pytest.raises(ValueError, match="none with ratio=sequence"):
        replace(GRPO, ratio="sequence", correction="tis")


def test_tokens_that_are_left_out_count_in_no_mean() -> None:
    weights = weights_of("mis")
    assert weights.mask_BT.tolist() == [[False, True, False], [True, True, False]]
    assert torch.allclose(weights.policy_BT, torch.tensor([[0.0, 0.5, 0.0], [1.0, 2.0, 0.0]]) / 3)
    weights = weights_of("mis", "sequence_mean")
    expected = torch.tensor([[0.0, 0.5, 0.0], [0.5, 1.0, 0.0]]) / 2
    assert torch.allclose(weights.policy_BT, expected)


def test_without_correction_nothing_is_weighed() -> None:
    weights = weights_of("none")
    assert torch.allclose(weights.policy_BT, torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]) / 5)


def test_an_engine_that_gives_no_log_probs_cannot_be_corrected() -> None:
    rollout = sampled([[0.0], [0.0]], [[0.0], [0.0]])
    rollout.completions = [Completion([7], [], "stop") for _ in range(2)]
    rollout.compare_with_sampler("none")
    assert rollout.sampler_ratios is None
    with pytest.raises(ValueError, match=r"algorithm.correction=tis needs the log-probs"):
        rollout.compare_with_sampler("tis")
