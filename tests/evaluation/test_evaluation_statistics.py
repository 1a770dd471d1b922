"""avg@k, pass@k and intervals against values computed by hand and by enumeration."""

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from rlt.evaluation.statistics import (
    avg_at_k_per_question,
    bootstrap_interval,
    majority_per_question,
    paired_difference_interval,
    pass_at_k_per_question,
    questions_to_tell_apart,
    rank_correlation,
    roc_area_interval,
    share_interval,
    t_interval,
)


def test_avg_at_k_by_hand() -> None:
    correct_PK = [[1, 0, 0, 0], [1, 1, 1, 0]]
    assert avg_at_k_per_question(correct_PK).tolist() == [0.25, 0.75]
    assert avg_at_k_per_question([*correct_PK, [1, 1, 1, 1]]).mean() == pytest.approx(2 / 3)


def test_pass_at_k_by_hand() -> None:
    # n = 4, c = 1: pass@1 = 1/4, pass@2 = 1 - C(3,2)/C(4,2) = 1 - 3/6, pass@4 = 1
    # n = 4, c = 2: pass@1 = 1/2, pass@2 = 1 - C(2,2)/C(4,2) = 1 - 1/6
    correct_PK = [[0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert pass_at_k_per_question(correct_PK, 1) == pytest.approx([1 / 4, 1 / 2, 0])
    assert pass_at_k_per_question(correct_PK, 2) == pytest.approx([1 / 2, 5 / 6, 0])
    assert pass_at_k_per_question(correct_PK, 4) == pytest.approx([1, 1, 0])
    assert pass_at_k_per_question(correct_PK, 2).mean() == pytest.approx((1 / 2 + 5 / 6) / 3)


@pytest.mark.parametrize("n", [1, 3, 6])
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(n: int) -> None:
    for c in range(n + 1):
        answers = [1] * c + [0] * (n - c)
        for k in range(1, n + 1):
            draws = list(combinations(answers, k))
            share = sum(any(draw) for draw in draws) / len(draws)
            assert pass_at_k_per_question([answers], k).mean() == pytest.approx(share, abs=1e-12)


def test_pass_at_k_stays_exact_for_many_samples() -> None:
    # C(900, 100) / C(1000, 100) overflows a float as a ratio of factorials; 1 - prod is stable
    expected = 1 - np.prod([(900 - i) / (1000 - i) for i in range(100)])
    assert pass_at_k_per_question([[1] * 100 + [0] * 900], 100).mean() == pytest.approx(
        expected, rel=1e-12
    )


@pytest.mark.parametrize("k", [0, 4])
def test_pass_at_k_needs_k_answers(k: int) -> None:
    with pytest.raises(ValueError, match=f"k is {k}, must lie in 1..3"):
        pass_at_k_per_question([[1, 0, 1]], k)


def test_partial_scores_and_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="partial scores"):
        pass_at_k_per_question([[0.5, 1.0]], 1)
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        avg_at_k_per_question([1, 0])
    with pytest.raises(ValueError, match=r"shape \(1, 2\)"):
        bootstrap_interval([[1.0, 0.0]])
    with pytest.raises(ValueError, match="confidence is 95"):
        bootstrap_interval([1.0, 0.0], confidence=95)
    with pytest.raises(ValueError, match="resamples is 0"):
        bootstrap_interval([1.0, 0.0], resamples=0)


def test_interval_of_two_questions_by_hand() -> None:
    # resampling (0, 1): mean 0, 1/2, 1 with chances 1/4, 1/2, 1/4
    assert bootstrap_interval([0.0, 1.0]) == (0.5, 0.0, 1.0)
    assert bootstrap_interval([0.0, 1.0], confidence=0.4) == (0.5, 0.5, 0.5)
    assert bootstrap_interval([0.3, 0.3, 0.3]) == pytest.approx((0.3, 0.3, 0.3))


def test_interval_is_reproducible_and_independent_of_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = np.random.default_rng(1).random(50)
    whole = bootstrap_interval(values, resamples=1000, seed=3)
    assert bootstrap_interval(values, resamples=1000, seed=3) == whole
    assert bootstrap_interval(values, resamples=1000, seed=4) != whole
    monkeypatch.setattr("rlt.evaluation.statistics._CELLS_PER_CHUNK", 50 * 7)
    assert bootstrap_interval(values, resamples=1000, seed=3) == pytest.approx(whole, abs=1e-12)


def test_interval_width_is_that_of_the_normal_approximation() -> None:
    values = np.array([0.0] * 200 + [1.0] * 200)
    mean, low, high = bootstrap_interval(values)
    assert mean == 0.5
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(400), rel=0.06)


def test_interval_of_another_statistic() -> None:
    mean, low, high = bootstrap_interval([1.0, 2.0, 9.0], np.median)
    assert (mean, low, high) == (2.0, 1.0, 9.0)


def test_interval_covers_the_true_mean_about_95_times_in_100() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(400):
        values = generator.beta(2, 3, size=60)  # true mean 2/5
        _, low, high = bootstrap_interval(values, resamples=500, seed=trial)
        hits += low <= 0.4 <= high
    assert 0.92 <= hits / 400 <= 0.975  # binomial(400, .95): standard deviation 0.011


def test_paired_interval_is_narrower_than_the_difference_of_two() -> None:
    generator = np.random.default_rng(0)
    difficulty = generator.random(200)
    a, b = difficulty + 0.05, difficulty + generator.normal(0, 0.02, 200)
    difference = paired_difference_interval(a, b)
    assert difference.mean == pytest.approx(np.mean(a - b))
    assert 0.04 < difference.low < 0.05 < difference.high < 0.06
    alone = bootstrap_interval(a)
    assert difference.high - difference.low < (alone.high - alone.low) / 5


def test_paired_interval_by_hand() -> None:
    assert paired_difference_interval([1, 1, 0], [0, 0, 1]).mean == pytest.approx(1 / 3)
    assert paired_difference_interval([1, 0.5], [0.5, 0]) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="same questions"):
        paired_difference_interval([1, 0], [1, 0, 1])


def test_shares_that_all_agree_have_an_interval_all_the_same() -> None:
    # No right answer to 32 questions: (1 - p)^32 = 0.025 at p = 0.1089.
    assert share_interval([0.0] * 32) == (0.0, 0.0, pytest.approx(0.1089, abs=1e-4))
    assert share_interval([1.0] * 32) == (1.0, pytest.approx(0.8911, abs=1e-4), 1.0)
    mixed = [0.0, 0.5, 1.0, 1.0]
    assert share_interval(mixed) == bootstrap_interval(mixed)


# --- seeds, majorities, planning ----------------------------------------------------------------


def test_students_interval_by_the_table() -> None:
    # mean 3, standard deviation sqrt(2.5), t(0.975, 4) = 2.776
    interval = t_interval([1, 2, 3, 4, 5])
    half = 2.7764451 * (2.5 / 5) ** 0.5
    assert interval == pytest.approx((3, 3 - half, 3 + half), abs=1e-6)
    with pytest.raises(ValueError, match="at least 2"):
        t_interval([1.0])


def test_majority_at_k_by_hand() -> None:
    answers = [
        ["7", "7", "5"],  # right by two votes
        ["5", "5", "7"],  # outvoted
        ["5", "7", "9"],  # a tie: the first one given
        [None, "", "7"],  # no answer is no vote
        [None, None, None],
    ]
    correct = [[1, 1, 0], [0, 0, 1], [0, 1, 0], [0, 0, 1], [0, 0, 0]]
    assert majority_per_question(answers, correct).tolist() == [1, 0, 0, 1, 0]


def test_questions_to_tell_apart() -> None:
    # Differences +1 and -1 three times to one: mean 0.5, standard deviation 0.8666;
    # ((1.96 + 0.8416) * 0.8666 / 0.5)^2 = 23.6
    a, b = [1, 1, 1, 0] * 250, [0, 0, 0, 1] * 250
    assert questions_to_tell_apart(a, b) == 24
    assert questions_to_tell_apart(b, a) == 24
    assert questions_to_tell_apart([1, 0], [0, 1]) is None  # equal means


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 1, 2]) == pytest.approx(-0.8)
    assert np.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))


def test_area_under_the_roc_curve_by_hand() -> None:
    # Good 3 and 1 against bad 2, 1 and 0: 3 beats all three, 1 beats 0 and ties with 1: 4.5 of 6.
    area = roc_area_interval([3, 1, 2, 1, 0], [True, True, False, False, False], list("abcde"))
    assert area.mean == pytest.approx(4.5 / 6)
    assert 0 <= area.low < area.mean < area.high <= 1


def test_area_agrees_with_scipy_and_its_interval_narrows() -> None:
    generator = np.random.default_rng(0)
    good, bad = generator.normal(1, 1, 400), generator.normal(0, 1, 300)
    expected = stats.mannwhitneyu(good, bad).statistic / (400 * 300)
    values, marks = [*good, *bad], [True] * 400 + [False] * 300
    wide = roc_area_interval(values, marks, [n % 20 for n in range(700)])
    narrow = roc_area_interval(values, marks, range(700))
    assert wide.mean == pytest.approx(expected)
    assert narrow.mean == pytest.approx(expected)
    # DeLong's standard error of an area of 0.76 from 400 and 300 values is about 0.018.
    assert (narrow.high - narrow.low) / 2 == pytest.approx(1.96 * 0.018, rel=0.15)


def test_rows_of_one_problem_are_drawn_together() -> None:
    values, marks = [1.0, 0.0, 0.0, 1.0], [True, False, True, False]
    copies = 50
    once = roc_area_interval(values * copies, marks * copies, range(4 * copies))
    together = roc_area_interval(
        values * copies, marks * copies, [n // 2 % 2 for n in range(4 * copies)]
    )
    assert together.high - together.low > 3 * (once.high - once.low)


def test_pairs_within_a_problem_weigh_in_the_interval_what_they_weigh_in_the_data() -> None:
    # A good one beats its own bad one; of two problems, the higher one's beats the lower one's.
    good, bad = [0.0, 1, 2, 3, 4, 5], [-0.1, 0.9, 1.9, 2.9, 3.9, 4.9]
    values = [*good, *bad]
    area = roc_area_interval(values, [True] * 6 + [False] * 6, [*range(6), *range(6)])
    assert area.mean == pytest.approx((6 + 15) / 36)
    assert area.low <= area.mean <= area.high


@pytest.mark.parametrize(("marks", "kind"), [([True, True], "good"), ([False, False], "bad")])
def test_an_area_needs_good_and_bad(marks: list[bool], kind: str) -> None:
    with pytest.raises(ValueError, match=f"all 2 rows are {kind}"):
        roc_area_interval([1, 2], marks, ["a", "b"])
