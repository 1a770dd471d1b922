"""Advantages, losses and weights against numbers computed by hand."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from rlt.training.algorithms import (
    Aggregation,
    Algorithm,
    group_advantages,
    loss_mask,
    move_reference_,
    policy_loss_terms,
    token_means,
    token_sums,
    token_weights,
)
from tests.training.fitting import CISPO, GRPO


def logs(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).log()


def close(actual: torch.Tensor, expected: Any, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=0, atol=tolerance)


def test_advantages_of_two_problems_with_two_completions() -> None:
    rewards_PG = torch.tensor([[1.0, 3.0], [-2.0, 2.0]])
    close(group_advantages(rewards_PG, scale=False), [[-1.0, 1.0], [-2.0, 2.0]])
    # unbiased std of (1, 3) is sqrt(2), of (-2, 2) sqrt(8)
    first, second = 1 / (math.sqrt(2) + 1e-4), 2 / (math.sqrt(8) + 1e-4)
    close(group_advantages(rewards_PG, scale=True), [[-first, first], [-second, second]])


@pytest.mark.parametrize("scale", [True, False])
def test_equal_rewards_give_exactly_zero(scale: bool) -> None:
    rewards_PG = torch.full((2, 7), 0.1)  # the mean of seven 0.1 is not 0.1 in float32
    assert group_advantages(rewards_PG, scale).tolist() == [[0.0] * 7] * 2


def test_a_reward_that_is_not_finite_is_named() -> None:
    rewards_PG = torch.tensor([[1.0, 2.0], [math.nan, math.inf]])
    with pytest.raises(ValueError, match=r"2 of 4 .* nan at \(problem 1, completion 0\), inf at"):
        group_advantages(rewards_PG, scale=True)


@pytest.mark.parametrize("shape", [(3, 1), (4,)])
def test_a_group_needs_two_completions(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least 2 completions per problem"):
        group_advantages(torch.zeros(shape), scale=True)


MASK_BT = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]])


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("sequence_mean", [[1 / 12] * 3, [1 / 4, 0, 0], [0.0] * 3, [1 / 8, 1 / 8, 0]]),
        ("token_mean", [[1 / 6] * 3, [1 / 6, 0, 0], [0.0] * 3, [1 / 6, 1 / 6, 0]]),
        ("max_length", [[1 / 20] * 3, [1 / 20, 0, 0], [0.0] * 3, [1 / 20, 1 / 20, 0]]),
    ],
)
def test_token_weights(aggregation: Aggregation, expected: list[list[float]]) -> None:
    close(token_weights(MASK_BT, aggregation, max_completion_tokens=5), expected)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "max_length"])
def test_a_batch_without_tokens_weighs_nothing(aggregation: Aggregation) -> None:
    assert token_weights(torch.zeros(2, 3), aggregation, 5).tolist() == [[0.0] * 3] * 2


def test_max_length_refuses_a_longer_completion() -> None:
    with pytest.raises(ValueError, match="max_completion_tokens=2, but a completion has 3 tokens"):
        token_weights(MASK_BT, "max_length", max_completion_tokens=2)


def test_overlong_completions_get_no_loss_only_if_asked() -> None:
    overlong_B = torch.tensor([True, False, False, False])
    assert loss_mask(MASK_BT, overlong_B, GRPO).int().tolist() == MASK_BT.tolist()
    masked_BT = loss_mask(MASK_BT, overlong_B, replace(GRPO, mask_overlong=True))
    assert masked_BT.int().tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0], [1, 1, 0]]


ONES_BT = torch.ones(2, 2)


def test_clipping_is_pessimistic() -> None:
    # ratios 1.5 and 0.5, once with advantage 1, once with advantage -2
    policy_BT, old_BT = logs([0.6, 0.2], [0.6, 0.2]), logs([0.4, 0.4], [0.4, 0.4])
    policy_BT.requires_grad_()
    terms = policy_loss_terms(policy_BT, old_BT, torch.tensor([[1.0], [-2.0]]), ONES_BT, GRPO)
    close(terms.per_token_BT.detach(), [[-1.2, -0.5], [3.0, 1.6]])
    close(terms.ratio_BT, [[1.5, 0.5], [1.5, 0.5]])
    assert terms.clipped_high_BT.tolist() == [[True, False], [False, False]]
    assert terms.clipped_low_BT.tolist() == [[False, False], [False, True]]
    terms.per_token_BT.sum().backward()
    assert policy_BT.grad is not None
    close(policy_BT.grad, [[0.0, -0.5], [3.0, 0.0]])  # -ratio * advantage where not clipped


def test_cispo_keeps_the_gradient_of_a_capped_token() -> None:
    # ratios 3 (capped at 1.5) and 0.5
    policy_BT, old_BT = logs([0.6, 0.2]).requires_grad_(), logs([0.2, 0.4])
    terms = policy_loss_terms(policy_BT, old_BT, torch.tensor([[2.0]]), ONES_BT[:1], CISPO)
    close(terms.per_token_BT.detach(), [[-3.0 * math.log(0.6), -1.0 * math.log(0.2)]])
    assert terms.clipped_high_BT.tolist() == [[True, False]]
    assert not terms.clipped_low_BT.any()
    terms.per_token_BT.sum().backward()
    assert policy_BT.grad is not None
    close(policy_BT.grad, [[-3.0, -1.0]])


def test_sequence_ratio_is_the_geometric_mean_over_the_mask() -> None:
    policy_BT, old_BT = logs([0.8, 0.1, 0.9]), logs([0.2, 0.1, 0.1])  # 4, 1; 9 is masked
    mask_BT = torch.tensor([[1, 1, 0]])
    algorithm = replace(GRPO, ratio="sequence", epsilon_high=10.0)
    terms = policy_loss_terms(policy_BT, old_BT, torch.tensor([[1.0]]), mask_BT, algorithm)
    close(terms.ratio_BT, [[2.0, 2.0, 0.0]])
    close(terms.per_token_BT, [[-2.0, -2.0, 0.0]])


def test_k3_to_the_reference_and_to_the_old_policy() -> None:
    policy_BT, old_BT, reference_BT = logs([0.25]), logs([0.5]), logs([0.75])
    algorithm = replace(GRPO, beta=0.1, epsilon_low=0.9)
    arguments = (policy_BT, old_BT, torch.tensor([[1.0]]), ONES_BT[:1, :1])
    plain = policy_loss_terms(*arguments, algorithm, reference_BT)
    k3 = 3 - math.log(3) - 1
    close(plain.per_token_BT, [[-0.5 + 0.1 * k3]])
    weighted = policy_loss_terms(
        *arguments, replace(algorithm, importance_weighted_k3=True), reference_BT
    )
    close(weighted.per_token_BT, [[-0.5 + 0.1 * 0.5 * k3]])
    assert weighted.reference_k3_BT is not None
    close(weighted.reference_k3_BT, [[k3]])
    close(weighted.k1_BT, [[math.log(2)]])  # old / policy = 2
    close(weighted.k3_BT, [[0.5 + math.log(2) - 1]])


@pytest.mark.parametrize(("weighted", "expected"), [(False, 1 - 3.0), (True, -math.log(3))])
def test_on_policy_gradient_of_k3(weighted: bool, expected: float) -> None:
    # plain: d/dlogp (exp(d) - d - 1) = 1 - exp(d); times the ratio, the exp(d) cancel and leave -d
    policy_BT = logs([0.25]).requires_grad_()
    algorithm = replace(GRPO, beta=1.0, importance_weighted_k3=weighted)
    terms = policy_loss_terms(
        policy_BT, None, torch.tensor([[0.0]]), ONES_BT[:1, :1], algorithm, logs([0.75])
    )
    terms.per_token_BT.sum().backward()
    assert policy_BT.grad is not None
    close(policy_BT.grad, [[expected]])


def test_beta_without_reference_is_refused() -> None:
    with pytest.raises(ValueError, match=r"beta=0.1 needs the reference's log-probs"):
        policy_loss_terms(
            logs([0.5]), None, torch.ones(1, 1), ONES_BT[:1, :1], replace(GRPO, beta=0.1)
        )


def test_a_reference_without_beta_is_only_watched() -> None:
    terms = policy_loss_terms(
        logs([0.25]), None, torch.ones(1, 1), ONES_BT[:1, :1], GRPO, logs([0.75])
    )
    close(terms.per_token_BT, [[-1.0]])
    assert terms.reference_k3_BT is not None
    close(terms.reference_k3_BT, [[2 - math.log(3)]])


@pytest.mark.parametrize("algorithm", [GRPO, replace(GRPO, ratio="sequence"), CISPO])
def test_masked_positions_may_hold_anything(algorithm: Algorithm) -> None:
    algorithm = replace(algorithm, beta=0.1, importance_weighted_k3=True)
    junk = torch.tensor([[math.nan, -math.inf], [0.0, math.nan]])
    mask_BT = torch.tensor([[0, 0], [1, 0]])
    policy_BT = (torch.tensor([[0.0, 0.0], [-1.0, 0.0]]) + junk).requires_grad_()
    terms = policy_loss_terms(policy_BT, junk - 1, torch.ones(2, 1), mask_BT, algorithm, junk - 1)
    weights_BT = token_weights(mask_BT, "sequence_mean", 2)
    (terms.per_token_BT * weights_BT).sum().backward()
    assert policy_BT.grad is not None and policy_BT.grad[1, 0] != 0
    assert policy_BT.grad[0].tolist() == [0.0, 0.0] and policy_BT.grad[1, 1] == 0
    means = token_means([token_sums(terms, mask_BT)])
    assert means["ratio"] == pytest.approx(1.0) and all(map(math.isfinite, means.values()))


def test_an_extreme_ratio_stays_finite() -> None:
    policy_BT, old_BT = torch.tensor([[-0.1, -0.1]]), torch.tensor([[-500.0, -500.0]])
    for advantage in (0.0, -1.0, 1.0):
        terms = policy_loss_terms(policy_BT, old_BT, torch.tensor([[advantage]]), ONES_BT[:1], GRPO)
        assert terms.per_token_BT.isfinite().all() and terms.k3_BT.isfinite().all()


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "max_length"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_one_batch_of_eight_equals_eight_of_one(aggregation: Aggregation, ratio: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (8, 11)
    old_BT, reference_BT, noise_BT = (-3 * torch.rand(shape, generator=generator) for _ in range(3))
    advantages_B1 = torch.randn(8, 1, generator=generator)
    lengths_B = torch.tensor([11, 1, 5, 0, 7, 2, 11, 3])
    mask_BT = torch.arange(11) < lengths_B.unsqueeze(1)
    algorithm = replace(
        GRPO, aggregation=aggregation, ratio=ratio, beta=0.04, importance_weighted_k3=True
    )
    weights_BT = token_weights(mask_BT, aggregation, 16)
    gradients, means = [], []
    for size in (8, 1):
        policy_BT = (old_BT + 0.2 * noise_BT).requires_grad_()
        sums = []
        for start in range(0, 8, size):
            # a micro-batch is also cut to its own longest completion
            tokens = max(int(lengths_B[start : start + size].max()), 1)
            cut = (slice(start, start + size), slice(0, tokens))
            terms = policy_loss_terms(
                policy_BT[cut], old_BT[cut], advantages_B1[cut[0]], mask_BT[cut], algorithm,
                reference_BT[cut],
            )  # fmt: skip
            (terms.per_token_BT * weights_BT[cut]).sum().backward()
            sums.append(token_sums(terms, mask_BT[cut]))
        assert policy_BT.grad is not None
        gradients.append(policy_BT.grad)
        means.append(token_means(sums))
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-8)
    assert means[0] == pytest.approx(means[1], rel=1e-5)


def test_tokens_may_have_advantages_of_their_own() -> None:
    policy_BT = logs([0.6, 0.2])
    mixed_BT = torch.tensor([[2.0, -3.0]])
    terms = policy_loss_terms(policy_BT, logs([0.4, 0.4]), mixed_BT, ONES_BT[:1], GRPO)
    # Ratios 1.5 and 0.5: min(1.5 × 2, 1.2 × 2), and min(0.5 × -3, 0.8 × -3).
    close(terms.per_token_BT, [[-2.4, 2.4]])


def test_negative_advantages_may_weigh_less() -> None:
    weak = replace(GRPO, negative_weight=0.25)
    mixed_BT = torch.tensor([[2.0, -4.0]])
    terms = policy_loss_terms(logs([0.4, 0.4]), None, mixed_BT, ONES_BT[:1], weak)
    close(terms.per_token_BT, [[-2.0, 1.0]])


def test_means_are_per_token_over_all_micro_batches() -> None:
    # tokens of two micro-batches: ratios 1.5, 0.5 | 1.0
    advantages_B1 = torch.tensor([[1.0]])
    first = policy_loss_terms(
        logs([0.6, 0.2]), logs([0.4, 0.4]), advantages_B1, ONES_BT[:1], GRPO, logs([0.6, 0.2])
    )
    mask_BT = torch.tensor([[1, 0]])
    second = policy_loss_terms(
        logs([0.4, 0.1]), logs([0.4, 0.9]), advantages_B1, mask_BT, GRPO, logs([0.8, 0.1])
    )
    means = token_means([token_sums(first, ONES_BT[:1]), token_sums(second, mask_BT)])
    assert means == pytest.approx(
        {
            "ratio": 1.0,
            "clip_low_rate": 0.0,
            "clip_high_rate": 1 / 3,
            "kl_old_k1": (-math.log(1.5) - math.log(0.5)) / 3,
            "kl_old_k3": (0.5 - math.log(1.5) - 0.5 - math.log(0.5)) / 3,
            "kl_reference_k3": (1 - math.log(2)) / 3,
        },
        abs=1e-6,
    )


def test_without_tokens_there_are_no_means() -> None:
    assert token_means([]) == {}
    terms = policy_loss_terms(logs([0.5]), None, torch.ones(1, 1), torch.zeros(1, 1), GRPO)
    assert token_means([token_sums(terms, torch.zeros(1, 1))]) == {}


def test_reference_moves_towards_the_policy() -> None:
    reference, policy = torch.tensor([0.0, 10.0]), torch.tensor([1.0, 20.0], requires_grad=True)
    move_reference_([reference], [policy], mix_up=0.9)
    close(reference, [0.9, 19.0])
    close(policy.detach(), [1.0, 20.0])


def test_reference_moves_every_n_steps() -> None:
    every_3 = replace(GRPO, reference_update_every_steps=3)
    assert [step for step in range(10) if every_3.moves_reference_after(step)] == [3, 6, 9]
    assert not any(GRPO.moves_reference_after(step) for step in range(10))
