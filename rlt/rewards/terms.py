"""The terms of a teacher's reward, and the reductions that turn token values into numbers.

Terms are pure functions of one completion's scores (arXiv 2506.08388, section 3.2).

A term gives token values, reduces them in one or more ways and weighs them: with the paper's λ as
`weight: 3` and its α in `coefficients: {mean: 1, max: 0.01}` it contributes 3 * (mean + 0.01 max).
To add a term, write a class with `needs`, `sign`, `weight`, `coefficients`, `of_explanation` and
`values`, and name it in a reward's YAML file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rlt.sampling import Rollout


@dataclass(frozen=True)
class TokenScores:
    """What is known of one completion. K: solution tokens, T: the explanation's tokens.

    Attributes:
        solution_log_probs_K: student's log-probs of the solution, after question and thought.
        student_log_probs_T: student's log-probs of the explanation, as its own thought.
        teacher_log_probs_T: teacher's log-probs of the explanation it wrote; None where no term
            asks for them.
        exact_kl_T: KL(teacher‖student) over the vocabulary at each explanation token, in nats.
        correct_rate: share of the student's sampled answers that were verified as right.
        end_tag_found: whether the teacher closed its explanation.
        student_hidden_TD: student's hidden states that predict the explanation's tokens; None
            where nobody asks for them.
    """

    solution_log_probs_K: Tensor
    student_log_probs_T: Tensor
    teacher_log_probs_T: Tensor | None
    end_tag_found: bool
    exact_kl_T: Tensor | None = None
    correct_rate: float | None = None
    student_hidden_TD: Tensor | None = None


class Term(Protocol):
    """One addend of the reward."""

    @property
    def needs(self) -> frozenset[str]:
        """Beyond the student's log-probs: `teacher_log_probs`, `exact_kl`, `correct_rate`."""
        ...

    @property
    def sign(self) -> float:
        """1 if more is better, -1 if less is."""
        ...

    @property
    def weight(self) -> float:
        """Of the term in the reward."""
        ...

    @property
    def coefficients(self) -> Mapping[str, float]:
        """Reduction → its share in the term."""
        ...

    @property
    def of_explanation(self) -> bool:
        """Whether there is one value for each token of the explanation."""
        ...

    def values(self, scores: TokenScores) -> Tensor:
        """The term's values `[T]` at the tokens of one completion, or `[1]` for the whole of it."""
        ...


# `median` is the lower of the two middle values, as torch has it and the published code uses it.
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.mean,
    "sum": torch.sum,
    "min": torch.min,
    "max": torch.max,
    "median": torch.median,
    "first_quartile": lambda x: torch.quantile(x, 0.25),
    "last_quartile": lambda x: torch.quantile(x, 0.75),
}


def reduce_tokens(values_T: Tensor, how: str) -> float:
    """Reduce token values to one number; no tokens give 0 (nothing said, nothing to judge)."""
    if values_T.numel() == 0:
        return 0.0
    return float(REDUCTIONS[how](values_T))


def token_addends(term: Term, values_T: Tensor) -> Tensor:
    """What each token of the explanation adds to the reward: the term's mean and sum, taken apart.

    Other reductions (extremes, quartiles) belong to no single token, and are left out.
    """
    share = term.coefficients.get("mean", 0.0) / max(1, values_T.numel())
    return term.sign * term.weight * (share + term.coefficients.get("sum", 0.0)) * values_T


def check_coefficients(term: str, coefficients: Mapping[str, float]) -> None:
    """Raises ValueError when a reduction is unknown or none is given."""
    unknown = sorted(set(coefficients) - set(REDUCTIONS))
    if unknown or not coefficients:
        raise ValueError(
            f"{term}.coefficients={dict(coefficients)}: give one or more of "
            f"{', '.join(REDUCTIONS)}" + (f"; unknown: {', '.join(unknown)}" if unknown else "")
        )


def k1(teacher_T: Tensor, student_T: Tensor) -> Tensor:
    """The sampled log-ratio, the paper's "KL"."""
    return teacher_T - student_T


def k3(teacher_T: Tensor, student_T: Tensor) -> Tensor:
    """Schulman's estimator `r - 1 + exp(-r)` of the log-ratio r, never negative."""
    ratio_T = teacher_T - student_T
    return ratio_T - 1 + torch.exp(-ratio_T)


def cross_entropy(student_T: Tensor) -> Tensor:
    """The student's surprise alone, without the teacher's entropy."""
    return -student_T


ESTIMATORS = {"k1": k1, "k3": k3}
KL_ESTIMATORS = (*ESTIMATORS, "cross_entropy", "exact")


@dataclass
class SolutionLogProb:
    """r_SS, which asks whether the explanation makes the solution likely for the student.

    Args:
        coefficients: reduction → its share in the term.
        transform: `none` for log-probs, `exp` for probabilities.
        clip: log-probs below `-clip` count as `-clip`.
        weight: of the term in the reward.
    """

    coefficients: dict[str, float]
    transform: str = "none"
    clip: float | None = None
    weight: float = 1.0
    sign: float = field(default=1.0, init=False)
    of_explanation: bool = field(default=False, init=False)
    needs: frozenset[str] = field(default=frozenset(), init=False)

    def __post_init__(self) -> None:
        check_coefficients("SolutionLogProb", self.coefficients)
        if self.transform not in ("none", "exp"):
            raise ValueError(f"SolutionLogProb.transform={self.transform!r}: choose none or exp")

    def values(self, scores: TokenScores) -> Tensor:
        """Log-probs (nats) or probabilities `[K]` of the solution's tokens."""
        values_K = scores.solution_log_probs_K
        if self.transform == "exp":
            values_K = values_K.exp()
        return values_K if self.clip is None else values_K.clamp(min=-self.clip)


@dataclass
class ThoughtKL:
    """r_KL, which counts against what the student would not have thought by itself.

    Args:
        coefficients: reduction → its share in the term; what is positive counts against the reward.
        estimator: `k1`, `k3`, `cross_entropy` or `exact` (over the whole vocabulary).
        transform: `none`, or `one_minus_exp` for `1 - exp(-kl)`.
        clip: values above `clip` count as `clip`.
        weight: of the term in the reward, the paper's λ.
    """

    coefficients: dict[str, float]
    estimator: str = "k1"
    transform: str = "none"
    clip: float | None = None
    weight: float = 1.0
    sign: float = field(default=-1.0, init=False)
    of_explanation: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        check_coefficients("ThoughtKL", self.coefficients)
        if self.estimator not in KL_ESTIMATORS:
            raise ValueError(
                f"ThoughtKL.estimator={self.estimator!r}: choose {', '.join(KL_ESTIMATORS)}"
            )
        if self.transform not in ("none", "one_minus_exp"):
            raise ValueError(
                f"ThoughtKL.transform={self.transform!r}: choose none or one_minus_exp"
            )

    @property
    def is_plain_k1(self) -> bool:
        """Whether its values are the sampled log-ratio itself, whose expectation is the KL."""
        return self.estimator == "k1" and self.transform == "none" and self.clip is None

    @property
    def needs(self) -> frozenset[str]:
        """`teacher_log_probs` or `exact_kl`, as the estimator asks."""
        if self.estimator == "cross_entropy":
            return frozenset()
        return frozenset({"exact_kl" if self.estimator == "exact" else "teacher_log_probs"})

    def values(self, scores: TokenScores) -> Tensor:
        """The estimate of KL(teacher‖student) `[T]`, in nats, at the explanation's tokens."""
        if self.estimator == "exact":
            assert scores.exact_kl_T is not None
            values_T = scores.exact_kl_T
        elif self.estimator == "cross_entropy":
            values_T = cross_entropy(scores.student_log_probs_T)
        else:
            assert scores.teacher_log_probs_T is not None
            values_T = ESTIMATORS[self.estimator](
                scores.teacher_log_probs_T, scores.student_log_probs_T
            )
        if self.transform == "one_minus_exp":
            values_T = 1 - torch.exp(-values_T)
        return values_T if self.clip is None else values_T.clamp(max=self.clip)


@dataclass
class Length:
    """Control: one point per explanation token, whatever it says. `sum` counts tokens."""

    coefficients: dict[str, float]
    weight: float = 1.0
    sign: float = field(default=1.0, init=False)
    of_explanation: bool = field(default=True, init=False)
    needs: frozenset[str] = field(default=frozenset(), init=False)

    def __post_init__(self) -> None:
        check_coefficients("Length", self.coefficients)

    def values(self, scores: TokenScores) -> Tensor:
        """Ones `[T]`."""
        return torch.ones_like(scores.student_log_probs_T)


@dataclass
class Random:
    """Control: a number drawn from [0, 1) for each completion, whatever it says."""

    coefficients: dict[str, float]
    weight: float = 1.0
    sign: float = field(default=1.0, init=False)
    of_explanation: bool = field(default=False, init=False)
    needs: frozenset[str] = field(default=frozenset(), init=False)

    def __post_init__(self) -> None:
        check_coefficients("Random", self.coefficients)

    def values(self, scores: TokenScores) -> Tensor:
        """One number `[1]`, drawn anew at each call."""
        return torch.rand(1)


@dataclass
class Correctness:
    """Share of the student's answers, sampled after the teacher's thought, verified as right.

    Args:
        coefficients: reduction → its share (one value, so every reduction is the same).
        weight: of the term in the reward.
        samples: answers sampled per explanation.
        rollout: how the student samples them (a `rollout` node).
    """

    coefficients: dict[str, float]
    samples: int
    rollout: "Rollout"
    weight: float = 1.0
    sign: float = field(default=1.0, init=False)
    of_explanation: bool = field(default=False, init=False)
    needs: frozenset[str] = field(default=frozenset({"correct_rate"}), init=False)

    def __post_init__(self) -> None:
        check_coefficients("Correctness", self.coefficients)
        if self.samples < 1:
            raise ValueError(f"Correctness.samples={self.samples} must be at least 1")

    def values(self, scores: TokenScores) -> Tensor:
        """The share of right answers, `[1]`."""
        assert scores.correct_rate is not None
        return torch.tensor([scores.correct_rate])
