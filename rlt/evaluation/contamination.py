"""Overlap between the training problems and the questions: equal questions, and runs of words.

Questions from one template share most of their words without being the same question. By default
only equal questions are refused therefore, and shared runs of words are reported. The check is run
by `rlt stage=evaluate data@trained_on=…`, and by every pipeline with its own data.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rlt.data.problem import Problem
from rlt.evaluation.graders import normalise

_SHOWN = 3


@dataclass(frozen=True)
class Contamination:
    """Limits of the overlap: the `contamination` node of a config.

    Args:
        ngram_words: the length of a shared run of words; a shorter question counts as a whole.
        max_exact_fraction: the largest fraction of questions that may be training questions.
        max_ngram_fraction: the largest fraction that may share a run of words with a training text.

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
        """Compute the metrics `eval/contamination_…_fraction`.

        Args:
            trained_on: the training problems, with their explanations.
            questions: the questions to be asked, at least one.

        Raises:
            ValueError: a fraction is above its limit; the message has examples.
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
    """Split a text into words, numbers and signs, case folded and without punctuation."""
    return re.findall(r"\w+|[^\w\s.,;:!?\"'()]", text.casefold())


def ngrams(text: str, n: int) -> set[str]:
    """Return all runs of n words of a text, or the whole of a shorter text."""
    words = words_of(text)
    if len(words) <= n:
        return {" ".join(words)} if words else set()
    return {" ".join(words[i : i + n]) for i in range(len(words) - n + 1)}
