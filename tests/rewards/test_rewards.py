"""Reward terms by hand, and every shipped reward on fixed scores."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from rlt.config.build import build
from rlt.config.compose import config_dir
from rlt.llm.finite_checks import NotFiniteError
from rlt.rewards import (
    Correctness,
    Length,
    Reward,
    SolutionLogProb,
    ThoughtKL,
    TokenScores,
)
from rlt.rewards.terms import REDUCTIONS, reduce_tokens

# teacher - student = [1, -0.5, 0, 3]
SCORES = TokenScores(
    solution_log_probs_K=torch.tensor([-1.0, -2.0, -4.0]),
    student_log_probs_T=torch.tensor([-2.0, -0.5, -1.0, -4.0]),
    teacher_log_probs_T=torch.tensor([-1.0, -1.0, -1.0, -1.0]),
    end_tag_found=True,
    exact_kl_T=torch.tensor([0.5, 0.25, 0.0, 1.0]),
    correct_rate=0.75,
)
SOLUTION = -7 / 3 + 0.01 * -4  # r_SS of the paper on SCORES
E = math.exp
K3 = [E(-1), E(0.5) - 1.5, 0.0, 2 + E(-3)]  # r - 1 + exp(-r)
# By hand: solution mean -7/3, min -4, median -2, first quartile -3;
# log-ratio mean 0.875, max 3, lower median 0, last quartile 1 + (3 - 1) / 4 = 1.5.
EXPECTED = {
    "rlt": SOLUTION - 3 * 0.875 - 0.03 * 3,
    "rlt_5": 5 * -7 / 3 + 0.05 * -4 - 5 * 0.875 - 0.05 * 3,
    "no_min_max": -7 / 3 - 3 * 0.875,
    "solution_only": SOLUTION,
    "kl_only": -3 * 0.875 - 0.03 * 3,
    "k3": SOLUTION - 3 * sum(K3) / 4 - 0.03 * (2 + E(-3)),
    "no_entropy": SOLUTION - 3 * 7.5 / 4 - 0.03 * 4,  # the student's surprise: 2, 0.5, 1, 4
    "full_kl": SOLUTION - 3 * 1.75 / 4 - 0.03 * 1,
    "exp": (E(-1) + E(-2) + E(-4)) / 3 + 0.01 * E(-4)
    - 3 * (3 - E(-1) - E(0.5) - E(-3)) / 4 - 0.03 * (1 - E(-3)),
    "median": -2 + 0.1 * -3 - 0 - 0.1 * 1.5,
    "length": 0.1 * 4,
    "correctness": 0.75,
}  # fmt: skip


def changed(**values: Any) -> TokenScores:
    return TokenScores(**(vars(SCORES) | values))


def test_every_shipped_reward_has_an_expectation() -> None:
    shipped = {path.stem for path in (config_dir() / "reward").glob("*.yaml")}
    assert shipped == {*EXPECTED, "random"}


def test_a_random_reward_depends_on_nothing(composed: Callable[..., DictConfig]) -> None:
    reward: Reward = build(composed("stage=teacher_rl", "reward=random").reward)
    torch.manual_seed(0)
    drawn = reward([SCORES] * 200).rewards
    assert 0 <= min(drawn) < 0.05 and 0.95 < max(drawn) < 1
    assert len(set(drawn)) == 200
    torch.manual_seed(0)
    assert reward([changed(end_tag_found=False)]).rewards == [drawn[0] - 1]


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_every_shipped_reward_by_hand(name: str, composed: Callable[..., DictConfig]) -> None:
    reward: Reward = build(composed("stage=teacher_rl", f"reward={name}").reward)
    table = reward([SCORES, changed(end_tag_found=False)])
    assert table.rewards == pytest.approx([EXPECTED[name], EXPECTED[name] - 1], abs=1e-5)
    assert table.terms["end_tag_penalty"] == [0.0, 1.0]
    of_the_student_alone = {"solution_only", "no_entropy", "length"}
    otherwise = set() if name in of_the_student_alone else {"teacher_log_probs"}
    special = {"full_kl": {"exact_kl"}, "correctness": {"correct_rate"}}
    assert reward.needs == special.get(name, otherwise)


def test_the_table_names_unweighted_terms(composed: Callable[..., DictConfig]) -> None:
    table = build(composed("stage=teacher_rl", "reward=rlt").reward)([SCORES])
    assert table.row(0) == pytest.approx(
        {
            "reward": EXPECTED["rlt"],
            "solution_log_prob/mean": -7 / 3,
            "solution_log_prob/min": -4.0,
            "thought_kl/mean": 0.875,
            "thought_kl/max": 3.0,
            "end_tag_penalty": 0.0,
        },
        abs=1e-6,
    )


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", 2.0), ("sum", 8.0), ("min", -1.0), ("max", 5.0), ("median", 1.0),
        ("first_quartile", 0.5), ("last_quartile", 3.5),
    ],
)  # fmt: skip
def test_reductions(how: str, expected: float) -> None:
    # Sorted: -1, 1, 3, 5. Quartiles interpolate at places 0.75 and 2.25; the median is the lower.
    assert reduce_tokens(torch.tensor([3.0, -1.0, 5.0, 1.0]), how) == expected
    assert reduce_tokens(torch.tensor([]), how) == 0.0
    assert how in REDUCTIONS


def test_transforms_and_clips() -> None:
    def values(term: Any) -> list[float]:
        found: list[float] = term.values(SCORES).tolist()
        return found

    one = {"mean": 1.0}
    assert values(SolutionLogProb(one, clip=1.5)) == [-1.0, -1.5, -1.5]
    assert values(SolutionLogProb(one, "exp")) == pytest.approx([E(-1), E(-2), E(-4)])
    assert values(ThoughtKL(one)) == [1.0, -0.5, 0.0, 3.0]
    assert values(ThoughtKL(one, clip=0.75)) == [0.75, -0.5, 0.0, 0.75]
    assert values(ThoughtKL(one, "k3")) == pytest.approx(K3, abs=1e-6)
    assert values(ThoughtKL(one, "cross_entropy")) == [2.0, 0.5, 1.0, 4.0]
    assert values(ThoughtKL(one, "exact")) == [0.5, 0.25, 0.0, 1.0]
    assert values(ThoughtKL(one, "exact", "one_minus_exp")) == pytest.approx(
        [1 - E(-0.5), 1 - E(-0.25), 0.0, 1 - E(-1)]
    )
    assert values(Length(one)) == [1.0, 1.0, 1.0, 1.0]


def test_an_empty_explanation_gets_nothing_from_terms_over_its_tokens() -> None:
    nothing = torch.tensor([])
    scores = changed(student_log_probs_T=nothing, teacher_log_probs_T=nothing, end_tag_found=False)
    terms = {
        "solution": SolutionLogProb({"mean": 1.0}),
        "kl": ThoughtKL({"mean": 3.0, "max": 0.5, "median": 1.0, "last_quartile": 1.0}),
        "length": Length({"sum": 1.0}),
    }
    table = Reward(terms, missing_end_tag_penalty=0.25)([scores])
    assert table.rewards == pytest.approx([-7 / 3 - 0.25])
    assert table.terms["kl/max"] == [0.0] and table.terms["length/sum"] == [0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_term_that_is_not_finite_is_named(bad: float) -> None:
    reward = Reward({"r_ss": SolutionLogProb({"mean": 1.0}), "kl": ThoughtKL({"max": 1.0})})
    broken = changed(teacher_log_probs_T=torch.tensor([0.0, 0.0, bad, 0.0]))
    if bad == float("-inf"):
        broken = changed(teacher_log_probs_T=torch.full((4,), bad))
    table = reward([SCORES, broken])
    with pytest.raises(NotFiniteError, match=rf"reward term kl/max is {bad} \(problems: second\)"):
        table.require_finite(["first", "second"])


def test_a_term_without_weight_still_counts_as_one_that_must_be_finite() -> None:
    reward = Reward({"r_ss": SolutionLogProb({"mean": 0.0})})
    assert reward([SCORES]).rewards == [0.0]
    table = reward([changed(solution_log_probs_K=torch.tensor([float("nan")]))])
    with pytest.raises(NotFiniteError, match="r_ss/mean is nan"):
        table.require_finite(["one"])


def test_finite_terms_whose_sum_is_not_are_found_in_the_reward() -> None:
    table = Reward({"length": Length({"sum": 1e30}, weight=1e30)})([SCORES])
    with pytest.raises(NotFiniteError, match="reward is inf"):
        table.require_finite(["one"])


ONE: Mapping[str, float] = {"mean": 1.0}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Reward({}), "reward.terms is empty"),
        (lambda: Reward({"kl": None}), "reward.terms is empty"),
        (lambda: Reward({"l": Length({"sum": 1})}, -1.0), "missing_end_tag_penalty=-1.0"),
        (lambda: Reward({"l": Length({"sum": 1})}, 1.0, 0.0), "reward.temperature=0.0"),
        (lambda: SolutionLogProb({}), "SolutionLogProb.coefficients={}"),
        (lambda: SolutionLogProb({"avg": 1.0}), "unknown: avg"),
        (lambda: SolutionLogProb(dict(ONE), transform="log"), "transform='log'"),
        (lambda: ThoughtKL(dict(ONE), estimator="k2"), "choose k1, k3, cross_entropy, exact"),
        (lambda: ThoughtKL(dict(ONE), transform="exp"), "choose none or one_minus_exp"),
        (lambda: Correctness(dict(ONE), 0, None), "Correctness.samples=0"),
    ],
)
def test_settings_that_cannot_work_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
