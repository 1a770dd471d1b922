"""The reward of a completion: weighted terms, less a penalty for a missing end tag.

Departs from the published code in scoring what is there: an explanation without tokens gets 0
from the terms over its tokens, where the published code fills in the tag penalty.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlt.llm.finite_checks import require_finite
from rlt.rewards.terms import (
    Correctness,
    Term,
    ThoughtKL,
    TokenScores,
    reduce_tokens,
    token_addends,
)

__all__ = ["Reward", "RewardTable", "TokenScores"]


@dataclass(frozen=True)
class RewardTable:
    """Rewards of N completions with every term, by reduction, unweighted.

    `terms["solution_log_prob/mean"][n]` is the term's reduced value, before sign, weight and
    coefficient.
    """

    rewards: list[float]
    terms: dict[str, list[float]]
    scores: Sequence[TokenScores] = ()  # what they were made of, where there are tokens
    # What each token of an explanation adds to the reward, one vector a completion.
    token_rewards: Sequence[Tensor] = ()
    kl_weight: float = 0.0  # of the mean k1 log-ratio in the reward, the paper's λ

    @classmethod
    def joined(cls, tables: Sequence["RewardTable"]) -> "RewardTable":
        """Several tables of the same reward, one after the other; a single one as it is."""
        first = tables[0]
        if len(tables) == 1:
            return first
        return cls(
            rewards=[value for table in tables for value in table.rewards],
            terms={name: [v for t in tables for v in t.terms[name]] for name in first.terms},
            scores=[score for table in tables for score in table.scores],
            token_rewards=[values_T for table in tables for values_T in table.token_rewards],
            kl_weight=first.kl_weight,
        )

    def without_hidden(self) -> "RewardTable":
        """The table without the student's hidden states."""
        scores = [replace(score, student_hidden_TD=None) for score in self.scores]
        return replace(self, scores=scores)

    def row(self, n: int) -> dict[str, float]:
        """Reward and terms of completion n, by name."""
        return {"reward": self.rewards[n]} | {name: v[n] for name, v in self.terms.items()}

    def require_finite(self, problems: Sequence[str]) -> None:
        """Raises NotFiniteError at the first term, or else reward, that is NaN or infinite.

        Args:
            problems: the id of each completion's problem.
        """
        for name, column in self.terms.items():
            require_finite(f"reward term {name}", column, problems)
        require_finite("reward", self.rewards, problems)


class Reward:
    """Combines terms (`conf/reward/*.yaml`).

    Args:
        terms: name → term; the name is what is logged.
        missing_end_tag_penalty: subtracted when the teacher never closed its explanation.
        temperature: divides both models' logits; None takes the sampling temperature.

    Raises:
        ValueError: no terms, a negative penalty, or a temperature that is not positive.
    """

    def __init__(
        self,
        terms: Mapping[str, Term],
        missing_end_tag_penalty: float = 1.0,
        temperature: float | None = None,
    ) -> None:
        terms = {name: term for name, term in terms.items() if term is not None}
        if not terms:
            raise ValueError("reward.terms is empty: name at least one term")
        if missing_end_tag_penalty < 0:
            raise ValueError(
                f"reward.missing_end_tag_penalty={missing_end_tag_penalty} must not be negative: "
                "it is subtracted"
            )
        if temperature is not None and temperature <= 0:
            raise ValueError(f"reward.temperature={temperature} must be positive, or null")
        self.terms = terms
        self.missing_end_tag_penalty = missing_end_tag_penalty
        self.temperature = temperature

    @property
    def needs(self) -> frozenset[str]:
        """What its terms need beyond the student's log-probs (see `Term.needs`)."""
        return frozenset().union(*(term.needs for term in self.terms.values()))

    @property
    def kl_weight(self) -> float:
        """Of the mean sampled log-ratio of teacher and student in the reward, the paper's λ."""
        return sum(
            term.weight * term.coefficients.get("mean", 0.0)
            for term in self.terms.values()
            if isinstance(term, ThoughtKL) and term.is_plain_k1
        )

    @property
    def credits_tokens(self) -> bool:
        """Whether a part of the reward is a mean or a sum over the explanation's tokens."""
        return bool(self._dense_terms)

    @property
    def is_dense_by_k1_alone(self) -> bool:
        """Whether that part is the mean of the sampled log-ratio and nothing else."""
        return self.credits_tokens and all(
            isinstance(term, ThoughtKL) and term.is_plain_k1 and not term.coefficients.get("sum")
            for term in self._dense_terms
        )

    @property
    def _dense_terms(self) -> list[Term]:
        return [
            term
            for term in self.terms.values()
            if term.of_explanation
            and term.weight
            and (term.coefficients.get("mean") or term.coefficients.get("sum"))
        ]

    @property
    def correctness(self) -> Correctness | None:
        """The term that verifies sampled answers, if there is one."""
        found = [term for term in self.terms.values() if isinstance(term, Correctness)]
        return found[0] if found else None

    def __call__(self, scores: Sequence[TokenScores]) -> RewardTable:
        """Reward each completion; a pure function of its scores, but for the term `Random`."""
        rewards: list[float] = []
        token_rewards: list[Tensor] = []
        columns: dict[str, list[float]] = {}
        for one in scores:
            penalty = 0.0 if one.end_tag_found else self.missing_end_tag_penalty
            total = -penalty
            addends_T = torch.zeros(len(one.student_log_probs_T))
            for name, term in self.terms.items():
                values = term.values(one)
                if term.of_explanation:
                    addends_T = addends_T + token_addends(term, values)
                for how, coefficient in term.coefficients.items():
                    reduced = reduce_tokens(values, how)
                    columns.setdefault(f"{name}/{how}", []).append(reduced)
                    total += term.sign * term.weight * coefficient * reduced
            columns.setdefault("end_tag_penalty", []).append(penalty)
            rewards.append(total)
            token_rewards.append(addends_T)
        return RewardTable(rewards, columns, scores, token_rewards, self.kl_weight)
