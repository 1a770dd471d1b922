"""Overlap between what was trained on and what is asked: exact questions, and runs of words.

Templates make neighbours of honest questions (a word problem with other numbers shares most of its
words), so only exact questions are refused by default; shared runs of words are reported.
Run by `rlt stage=evaluate data@trained_on=…`, and by every pipeline with its own data.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rlt.data.problem import Problem
from rlt.evaluation.graders import normalise

_SHOWN = 3


@dataclass(frozen=True)
class Contamination:
    """Limits of overlap; the `contamination` node of a config.

    Args:
        ngram_words: length of a run of words that two texts share; shorter questions count whole.
        max_exact_fraction: largest share of questions that may stand in the training problems.
        max_ngram_fraction: largest share that may share a run of words with them.

    Raises:
        ValueError: a number is out of its range.
    """

    ngram_words: int
    max_exact_fraction: float
    max_ngram_fraction: float

    def __post_init__(self) -> None:
        if self.ngram_words < 1:
            raise ValueError(f"contamination.ngram_words={self.ngram_words} must be at least 1")
        for name in ("max_exact_fraction", "max_ngram_fraction"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise ValueError(f"contamination.{name}={share} must lie between 0 and 1")

    def check(
        self, trained_on: Iterable[Problem], questions: Sequence[Problem]
    ) -> dict[str, float]:
        """Metrics `eval/contamination_…_fraction`.

        Raises:
            ValueError: a share is above its limit, with examples.
        """
        seen: set[str] = set()
        runs: set[str] = set()
        for problem in trained_on:
            seen.add(normalise(problem.question))
            runs.update(ngrams(problem.question, self.ngram_words))
            if problem.explanation:
                runs.update(ngrams(problem.explanation, self.ngram_words))
        exact = [p for p in questions if normalise(p.question) in seen]
        shared = [p for p in questions if runs & ngrams(p.question, self.ngram_words)]
        found = {"exact": exact, "ngram": shared}
        for name, problems in found.items():
            share, option = len(problems) / len(questions), f"max_{name}_fraction"
            limit = getattr(self, option)
            if share > limit:
                shown = "; ".join(repr(p.question[:80]) for p in problems[:_SHOWN])
                raise ValueError(
                    f"{len(problems)} of {len(questions)} questions ({100 * share:.1f} %) overlap "
                    f"with the training problems ({name}), more than contamination.{option}="
                    f"{limit}: {shown}. Ask other questions, train on others, or raise the limit"
                )
        return {
            f"eval/contamination_{name}_fraction": len(problems) / len(questions)
            for name, problems in found.items()
        }


def words_of(text: str) -> list[str]:
    """Words and numbers, case folded, without punctuation; signs between words count."""
    return re.findall(r"\w+|[^\w\s.,;:!?\"'()]", text.casefold())


def ngrams(text: str, n: int) -> set[str]:
    """Runs of n words; of a shorter text the whole of it."""
    words = words_of(text)
    if len(words) <= n:
        return {" ".join(words)} if words else set()
    return {" ".join(words[i : i + n]) for i in range(len(words) - n + 1)}
