"""avg@k, pass@k, majority@k and their intervals: pure functions over arrays.

`correct_PK` holds one row per question (P) and one column per sampled answer (K). Questions are the
unit that is resampled: the K answers to one question are not independent of each other, so an
interval over all P x K answers would be too narrow.

avg@k and paired comparisons instead of the paper's single scores: an independent re-evaluation with
avg@k found the 7B gain real and the 32B gain gone.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Statistic = Callable[..., Any]  # called as statistic(values, axis=-1), like np.mean or np.median
_CELLS_PER_CHUNK = 2_000_000


class Interval(NamedTuple):
    """The statistic of the sample itself, and the ends of its confidence interval."""

    mean: float
    low: float
    high: float


def _checked_PK(correct_PK: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(correct_PK, dtype=np.float64)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(
            f"correct_PK has shape {array.shape}, needs [questions, answers], both at least 1; "
            "pass one row of answers per question"
        )
    return array


def avg_at_k_per_question(correct_PK: ArrayLike) -> NDArray[np.float64]:
    """Share of right answers of each question."""
    return np.asarray(_checked_PK(correct_PK).mean(axis=1))


def pass_at_k_per_question(correct_PK: ArrayLike, k: int) -> NDArray[np.float64]:
    """Unbiased estimate, per question, that at least one of k answers is right.

    1 - C(n-c, k) / C(n, k) for c right of n, as the product of Chen et al. 2021 (arXiv 2107.03374).
    """
    correct = _checked_PK(correct_PK)
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}, must lie in 1..{n}; sample at least k answers per question")
    if not np.isin(correct, (0.0, 1.0)).all():
        raise ValueError("pass@k needs answers that are right (1) or wrong (0), not partial scores")
    wrong_P = n - correct.sum(axis=1)
    # C(w, k) / C(n, k) = prod over i < k of (w - i) / (n - i); a factor of 0 makes w < k give 0
    draws_k = np.arange(k)
    all_wrong_Pk = np.clip(wrong_P[:, None] - draws_k, 0, None) / (n - draws_k)
    return np.asarray(1.0 - all_wrong_Pk.prod(axis=1))


def bootstrap_interval(
    values_P: ArrayLike,
    statistic: Statistic = np.mean,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap: resample the questions with replacement, `resamples` times.

    With few questions it is somewhat too narrow, and where all values agree it has no width at all.
    """
    values = np.asarray(values_P, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(
            f"values have shape {values.shape}, need [questions], at least 1; "
            "reduce the answers of a question to one value first"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, must lie between 0 and 1, such as 0.95")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}, must be at least 1, such as 10000")
    generator = np.random.default_rng(seed)
    rows_per_chunk = max(1, _CELLS_PER_CHUNK // values.size)
    statistics: list[NDArray[np.float64]] = []
    for start in range(0, resamples, rows_per_chunk):
        rows = min(rows_per_chunk, resamples - start)
        picks = generator.integers(values.size, size=(rows, values.size))
        statistics.append(np.asarray(statistic(values[picks], axis=-1)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(statistics), [tail, 1 - tail])
    return Interval(float(statistic(values, axis=-1)), float(low), float(high))


def share_interval(
    shares_P: ArrayLike, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Interval of the mean of shares between 0 and 1, one a question.

    Bootstrapped, unless all are 0 or all are 1: resampling those gives no width, so the ends are
    then Clopper and Pearson's for as many questions (0 of n right: at most 1 - (α/2)^(1/n)).
    """
    interval = bootstrap_interval(shares_P, np.mean, confidence, resamples, seed)
    shares = np.asarray(shares_P, dtype=np.float64)
    reach = float(((1 - confidence) / 2) ** (1 / shares.size))
    if (shares == 0).all():
        return interval._replace(high=1 - reach)
    if (shares == 1).all():
        return interval._replace(low=reach)
    return interval


def paired_difference_interval(
    a_P: ArrayLike,
    b_P: ArrayLike,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Interval of mean(a - b) over the same questions in the same order, resampled in pairs."""
    a, b = np.asarray(a_P, dtype=np.float64), np.asarray(b_P, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(
            f"shapes are {a.shape} and {b.shape}, must agree; "
            "a paired comparison needs both models on the same questions"
        )
    return bootstrap_interval(a - b, np.mean, confidence, resamples, seed)


def t_interval(values_S: ArrayLike, confidence: float = 0.95) -> Interval:
    """Student's interval of a mean over independent runs (seeds).

    Resampling a handful of seeds would give an interval far too narrow (five seeds: about 82 %
    where it says 95), so that here the t distribution takes the place of the bootstrap.
    """
    values = np.asarray(values_S, dtype=np.float64)
    if values.ndim != 1 or values.size < 2:
        raise ValueError(f"values have shape {values.shape}, need [seeds], at least 2")
    half = float(stats.t.ppf((1 + confidence) / 2, values.size - 1) * stats.sem(values))
    mean = float(values.mean())
    return Interval(mean, mean - half, mean + half)


def majority_per_question(
    answers_PK: Sequence[Sequence[str | None]], correct_PK: ArrayLike
) -> NDArray[np.float64]:
    """majority@k: whether the most frequent of k answers to each question is right (1 or 0).

    Answers are grouped by their text; of answers equally frequent the one given first counts. No
    answer, or an empty one, is no vote, and a question without votes is wrong.
    """
    correct = _checked_PK(correct_PK)
    right = []
    for answers, verdicts in zip(answers_PK, correct, strict=True):
        votes = Counter(answer for answer in answers if answer)
        winner = votes.most_common(1)[0][0] if votes else None
        right.append(0.0 if winner is None else float(verdicts[list(answers).index(winner)]))
    return np.asarray(right)


def questions_to_tell_apart(
    a_P: ArrayLike, b_P: ArrayLike, confidence: float = 0.95, power: float = 0.8
) -> int | None:
    """Questions after which a difference as large as the one seen would be found, in pairs.

    From the spread of the paired differences, by the normal approximation; None if the means are
    equal. What was seen may itself be chance: the number is a help in planning, no more.
    """
    differences = np.asarray(a_P, dtype=np.float64) - np.asarray(b_P, dtype=np.float64)
    mean = float(differences.mean())
    if differences.size < 2 or mean == 0:
        return None
    reach = stats.norm.ppf((1 + confidence) / 2) + stats.norm.ppf(power)
    return int(np.ceil((reach * differences.std(ddof=1) / mean) ** 2))


def roc_area_interval(
    values_N: ArrayLike,
    good_N: ArrayLike,
    owners_N: Sequence[Any],
    confidence: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> Interval:
    """Area under the ROC curve: the chance that a good one has the higher value than a bad one.

    0.5 is chance, 1 tells them all apart; equal values count half (Mann and Whitney's U). The
    interval is a percentile bootstrap over owners, such as problems, whose rows are drawn together.

    Args:
        owners_N: what each row belongs to.

    Raises:
        ValueError: all rows are good, or all are bad.
    """
    values = np.asarray(values_N, dtype=np.float64)
    good = np.asarray(good_N, dtype=bool)
    if good.all() or not good.any():
        raise ValueError(
            f"all {good.size} rows are {'good' if good.size and good.all() else 'bad'}: an area "
            "compares good ones with bad ones"
        )
    names = list(dict.fromkeys(owners_N))
    place = {name: number for number, name in enumerate(names)}
    owner_N = np.array([place[name] for name in owners_N])
    # won_OO[a, b]: pairs of a good row of owner a and a bad row of owner b that are in order.
    of_good_GO = np.eye(len(names))[owner_N[good]]
    of_bad_BO = np.eye(len(names))[owner_N[~good]]
    above_GB = values[good][:, None] - values[~good][None, :]
    won_OO = of_good_GO.T @ np.heaviside(above_GB, 0.5) @ of_bad_BO
    goods_O, bads_O = of_good_GO.sum(0), of_bad_BO.sum(0)
    generator = np.random.default_rng(seed)
    draws_RO = generator.multinomial(
        len(names), np.full(len(names), 1 / len(names)), size=resamples
    ).astype(np.float64)
    # Pairs within an owner keep their share of all pairs: an owner that is drawn twice would else
    # have twice as many of them, and with few owners the interval would lie beside the area.
    pairs_OO = np.outer(goods_O, bads_O)
    same_OO = np.eye(len(names))

    def drawn_within(count_OO: np.ndarray) -> np.ndarray:
        return np.asarray(draws_RO @ np.diag(count_OO))

    def drawn_between(count_OO: np.ndarray) -> np.ndarray:
        others_OO = count_OO * (1 - same_OO)
        return np.asarray(((draws_RO @ others_OO) * draws_RO).sum(1))

    sums_R, shares_R = np.zeros(resamples), np.zeros(resamples)
    for drawn, part_OO in ((drawn_within, same_OO), (drawn_between, 1 - same_OO)):
        won_R, pairs_R = drawn(won_OO), drawn(pairs_OO)
        share_R = (pairs_OO * part_OO).sum() * (pairs_R > 0)
        sums_R += share_R * won_R / np.maximum(pairs_R, 1)
        shares_R += share_R
    areas = sums_R[shares_R > 0] / shares_R[shares_R > 0]
    tail = (1 - confidence) / 2
    low, high = np.quantile(areas, [tail, 1 - tail]) if areas.size else (0.0, 1.0)
    return Interval(float(won_OO.sum() / (goods_O.sum() * bads_O.sum())), float(low), float(high))


def rank_correlation(x_N: ArrayLike, y_N: ArrayLike) -> float:
    """Spearman's rank correlation; NaN if one side is constant or has fewer than three values."""
    x, y = np.asarray(x_N, dtype=np.float64), np.asarray(y_N, dtype=np.float64)
    if x.size < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(stats.spearmanr(x, y).statistic)
