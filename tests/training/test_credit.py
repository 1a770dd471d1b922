"""Advantages of single tokens against numbers computed by hand, and against the exact gradient."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from rlt.training.algorithms import group_advantages
from rlt.training.credit import (
    Baseline,
    CompletionCredit,
    TokenCredit,
    discounted_to_go,
    exact_kl_loss,
    spread,
    within_completions,
)

# Two explanations of one problem, of 2 and 3 tokens, each followed by an end tag of one token.
REWARDS_PG = torch.tensor([[1.0, 3.0]])
SHARES = [torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, 0.0, -2.0])]
LENGTHS = [3, 4]
TO_GO = TokenCredit(discount=1.0, weight=1.0, clip=None, baseline="none", exact=False)


def advantages(credit: TokenCredit, scale: bool = False) -> list[list[float]]:
    found_NT = credit.advantages(REWARDS_PG, SHARES, LENGTHS, scale)
    assert found_NT.shape == (2, 4)
    return [row[:length].tolist() for row, length in zip(found_NT, LENGTHS, strict=True)]


# The rest of the reward is 1 + 3 and 3 + 3, which is -1 and +1 about the group's mean.
@pytest.mark.parametrize(
    ("discount", "baseline", "expected"),
    [
        (1.0, "none", [[-1 - 3, -1 - 2, -1], [1 - 3, 1 - 2, 1 - 2, 1]]),
        (0.5, "none", [[-1 - 2, -1 - 2, -1], [1 - 1.5, 1 - 1, 1 - 2, 1]]),
        (0.0, "none", [[-1 - 1, -1 - 2, -1], [1 - 1, 1 - 0, 1 - 2, 1]]),
        # The mean token of the group pays -6 / 5 = -1.2.
        (0.0, "token", [[-1 + 0.2, -1 - 0.8, -1], [1 + 0.2, 1 + 1.2, 1 - 0.8, 1]]),
        (1.0, "token", [[-1 - 0.6, -1 - 0.8, -1], [1 + 0.6, 1 + 0.4, 1 - 0.8, 1]]),
        # Means at each place: -1, -1, and -2 of the longer one alone.
        (0.0, "position", [[-1, -1 - 1, -1], [1, 1 + 1, 1, 1]]),
        # What is still to come, halved at each token: (-2, -2) and (-1.5, -1, -2).
        (0.5, "position", [[-1 - 0.25, -1 - 0.5, -1], [1 + 0.25, 1 + 0.5, 1, 1]]),
    ],
)
def test_token_credit_by_hand(
    discount: float, baseline: Baseline, expected: list[list[float]]
) -> None:
    found = advantages(replace(TO_GO, discount=discount, baseline=baseline))
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-6)


def test_weight_multiplies_a_token_s_own_share_alone() -> None:
    found = advantages(replace(TO_GO, weight=3.0))
    assert found[0] == pytest.approx([-1 - 3 - 2, -1 - 6, -1])
    found = advantages(replace(TO_GO, weight=3.0, discount=0.0))
    assert found[1] == pytest.approx([1 - 3, 1, 1 - 6, 1])


def test_an_exact_share_is_left_to_the_loss() -> None:
    found = advantages(replace(TO_GO, weight=3.0, exact=True))
    assert found[0] == pytest.approx([-1 - 2, -1, -1])
    assert found[1] == pytest.approx([1 - 2, 1 - 2, 1, 1])
    weights_N = replace(TO_GO, weight=3.0, exact=True).kl_weights(REWARDS_PG, scale=True)
    assert weights_N is not None
    assert weights_N.tolist() == pytest.approx([3 / math.sqrt(2)] * 2)
    assert TO_GO.kl_weights(REWARDS_PG, scale=True) is None


def test_clip_bounds_a_share_times_the_tokens() -> None:
    # Within ±2 over 2 tokens: (-1, -1); over 3 tokens: (-2/3, 0, -2/3). The rest stays what it was.
    found = advantages(replace(TO_GO, clip=2.0))
    assert found[0] == pytest.approx([-1 - 2, -1 - 1, -1])
    assert found[1] == pytest.approx([1 - 4 / 3, 1 - 2 / 3, 1 - 2 / 3, 1])


def test_scale_divides_by_the_spread_of_the_whole_reward() -> None:
    plain, scaled = advantages(TO_GO), advantages(TO_GO, scale=True)
    std = math.sqrt(2)
    for one, other in zip(plain, scaled, strict=True):
        assert other == pytest.approx([value / std for value in one], abs=1e-6)


def test_one_spread_for_the_whole_batch() -> None:
    # Variances 2 and 0 of the groups: a group of equal rewards is divided by the spread of both.
    rewards_PG = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    assert spread(rewards_PG) == pytest.approx(math.sqrt((2 + 0) / 2))
    found_NT = TO_GO.advantages(rewards_PG, SHARES * 2, LENGTHS * 2, True)
    plain_NT = TO_GO.advantages(rewards_PG, SHARES * 2, LENGTHS * 2, False)
    torch.testing.assert_close(found_NT, plain_NT)


def test_a_batch_without_spread_is_not_blown_up() -> None:
    rewards_PG = torch.tensor([[1.0, 1.01], [2.0, 2.0]])
    assert spread(rewards_PG) == 0.5
    found_NT = TO_GO.advantages(rewards_PG, SHARES * 2, LENGTHS * 2, True)
    plain_NT = TO_GO.advantages(rewards_PG, SHARES * 2, LENGTHS * 2, False)
    torch.testing.assert_close(found_NT, plain_NT / 0.5)


def test_equal_completions_teach_nothing() -> None:
    for baseline in ("token", "position"):
        credit = replace(TO_GO, baseline=baseline, discount=0.0)
        same = [torch.tensor([-2.0, -2.0])] * 2
        found_NT = credit.advantages(torch.tensor([[2.0, 2.0]]), same, [3, 3], True)
        assert found_NT.tolist() == [[0.0] * 3] * 2


def test_groups_do_not_mix() -> None:
    rewards_PG = torch.tensor([[1.0, 3.0], [-5.0, 40.0]])
    more = [*SHARES, torch.tensor([9.0]), torch.tensor([7.0, -8.0])]
    for baseline in ("token", "position", "none"):
        credit = replace(TO_GO, baseline=baseline, discount=0.5)
        found_NT = credit.advantages(rewards_PG, more, [*LENGTHS, 2, 3], False)
        alone_NT = credit.advantages(REWARDS_PG, SHARES, LENGTHS, False)
        torch.testing.assert_close(found_NT[:2], alone_NT, rtol=0, atol=1e-6)


def test_the_first_token_of_a_reward_to_go_gets_the_completion_s_advantage() -> None:
    """Nothing is spent yet, so what is to come is the whole reward."""
    found_NT = replace(TO_GO, baseline="position").advantages(REWARDS_PG, SHARES, LENGTHS, False)
    expected_N = group_advantages(REWARDS_PG, scale=False).flatten()
    torch.testing.assert_close(found_NT[:, 0], expected_N, rtol=0, atol=1e-6)


def test_published_credit_gives_every_token_its_completion_s_advantage() -> None:
    found_NT = CompletionCredit().advantages(REWARDS_PG, SHARES, LENGTHS, True)
    expected_N1 = group_advantages(REWARDS_PG, True).view(2, 1)
    assert torch.equal(found_NT, expected_N1.expand(2, 4))
    assert within_completions(found_NT, LENGTHS) == 0.0


def test_share_of_the_credit_within_completions() -> None:
    # Squares add up to 1 + 9 + 4; about the first row's mean of 2 they are 1 + 1, about 2 nothing.
    rows_NT = torch.tensor([[1.0, 3.0], [2.0, 99.0]])
    assert within_completions(rows_NT, [2, 1]) == pytest.approx(2 / 14)
    assert within_completions(torch.zeros(1, 1), [1]) == 0.0


def test_discounted_sums_by_hand() -> None:
    found = discounted_to_go(torch.tensor([[1.0, 2.0, 4.0]]), 0.5)
    assert found.tolist() == [[1 + 0.5 * (2 + 0.5 * 4), 2 + 0.5 * 4, 4.0]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"discount": 1.5}, r"credit.discount=1.5: it must be between 0 and 1"),
        ({"weight": -1.0}, r"credit.weight=-1.0: it must be at least 0"),
        ({"clip": 0.0}, r"credit.clip=0.0: it must be above 0, or null"),
        ({"baseline": "mean"}, r"credit.baseline='mean': choose token, position, none"),
    ],
)
def test_values_out_of_range_are_refused(value: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TO_GO, **value)


def test_the_loss_weighs_each_completion_s_mean_kl(monkeypatch: pytest.MonkeyPatch) -> None:
    """KLs 1, 2 and 3 of two explanations of one and two tokens, each followed by an end tag."""
    monkeypatch.setattr(
        "rlt.training.credit.exact_kl", lambda p, p_ND, q, q_ND, T: (p_ND - q_ND).sum(-1)
    )
    policy_hidden = [torch.tensor([[1.0], [9.0]]), torch.tensor([[2.0], [3.0], [9.0]])]
    student_hidden = [torch.zeros(1, 1), torch.zeros(2, 1)]
    kl_weights_B = torch.tensor([6.0, 10.0])
    token_weights_BT = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.25, 0.25]])
    loss = exact_kl_loss(
        None, policy_hidden, None, student_hidden, kl_weights_B, token_weights_BT, 0.7
    )
    assert float(loss) == pytest.approx(6 * 1 * 0.5 + 10 * (2 + 3) / 2 * 0.25)


def expected_gradient(credit: Any, group: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of the expected reward, expectation of the estimate), over every possible group.

    A policy of two tokens from a vocabulary of two writes four explanations. Their reward is a
    number of their own less 3 × the mean log-ratio to a student, as in `reward=rlt`. An exact
    credit has the KL over the vocabulary in its loss, as `rlt.training.rl` has it.
    """
    logits = torch.tensor([[0.3, -0.4], [0.9, 0.1], [-0.7, 0.2]], requires_grad=True)
    student = torch.tensor([[0.0, 0.5], [-2.0, 3.0], [0.4, 0.0]]).log_softmax(-1)
    texts = list(itertools.product((0, 1), repeat=2))
    own = torch.tensor([0.2, 1.5, -0.6, 0.4])

    def log_probs(table: torch.Tensor, text: Sequence[int]) -> torch.Tensor:
        return torch.stack([table[0, text[0]], table[1 + text[0], text[1]]])

    policy_NT = torch.stack([log_probs(logits.log_softmax(-1), text) for text in texts])
    student_NT = torch.stack([log_probs(student, text) for text in texts])
    shares_NT = -3 * (policy_NT - student_NT) / 2
    rewards_N = own + shares_NT.sum(1)
    probs_N = policy_NT.sum(1).exp()
    kl_3 = (logits.softmax(-1) * (logits.log_softmax(-1) - student)).sum(-1)
    kl_NT = torch.stack([torch.stack([kl_3[0], kl_3[1 + text[0]]]) for text in texts])
    exact = torch.autograd.grad((probs_N * rewards_N).sum(), logits, retain_graph=True)[0]
    total = torch.zeros(())
    for picked in itertools.product(range(4), repeat=group):
        rows = list(picked)
        shares = [shares_NT[n].detach() for n in rows]
        rewards_PG = rewards_N[rows].detach()[None]
        advantages_NT = credit.advantages(rewards_PG, shares, [2] * group, False)
        chance = probs_N[rows].prod().detach()
        total = total + chance * (policy_NT[rows] * advantages_NT).sum() / group
        kl_weights_N = credit.kl_weights(rewards_PG, False)
        if kl_weights_N is not None:
            total = total - chance * (kl_weights_N[:, None] * 3 * kl_NT[rows] / 2).sum() / group
    return exact, torch.autograd.grad(total, logits)[0]


@pytest.mark.parametrize("credit", [CompletionCredit(), replace(TO_GO, baseline="position")])
def test_the_reward_to_go_is_an_unbiased_gradient_of_the_published_reward(credit: Any) -> None:
    """Up to (G - 1) / G, as each completion is part of the mean that is subtracted from it."""
    exact, estimate = expected_gradient(credit)
    torch.testing.assert_close(estimate, exact / 2, rtol=0, atol=1e-6)


def test_an_exact_share_has_the_gradient_of_the_sampled_one() -> None:
    """Without a baseline both are unbiased in the tokens' shares, the rest but for (G - 1) / G."""
    for discount in (0.0, 0.5, 1.0):
        sampled = expected_gradient(replace(TO_GO, discount=discount))[1]
        exact = expected_gradient(replace(TO_GO, discount=discount, exact=True))[1]
        torch.testing.assert_close(exact, sampled, rtol=0, atol=1e-6)


def test_a_discounted_credit_is_biased() -> None:
    exact, estimate = expected_gradient(replace(TO_GO, baseline="position", discount=0.0))
    assert (estimate - exact / 2).norm() > 0.1 * (exact / 2).norm()
