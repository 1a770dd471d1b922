"""What tells reward hacking early: numbers about explanations that no reward is made of.

Pure functions. `Teaching.monitor` puts them together during RL,
`rlt.training.callbacks.HackingMonitor` says when one leaves its healthy range, docs/metrics.md
defines each.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import TypeVar

Item = TypeVar("Item")

EARLY = 0.5  # a solution that stands in this first part of the text is told early


def first_position(solution: str, text: str) -> float | None:
    """Where a solution first stands in a text, from 0 (its start) to 1; None if it does not.

    It must stand by itself: `6` is not in `16`, and the case of letters does not matter.
    """
    if not solution.strip():
        return None
    found = re.search(rf"(?<!\w){re.escape(solution.strip())}(?!\w)", text, re.IGNORECASE)
    return None if found is None else found.start() / len(text)


def early_fraction(solutions: Sequence[str], texts: Sequence[str]) -> float:
    """Share of texts that tell the solution beside them in their first half."""
    places = [first_position(s, text) for s, text in zip(solutions, texts, strict=True)]
    return fmean(place is not None and place < EARLY for place in places)


def early_excess(solutions: Sequence[str], texts: Sequence[str], group: int) -> float:
    """`early_fraction` of the texts' own solutions, less that of the next group's: chance is 0.

    A short solution (one digit) stands in many a text by chance; what is over that is told.

    Args:
        solutions: of each text's own problem.
        texts: explanations, group after group.
        group: completions of one problem, which stand together.
    """
    return early_fraction(solutions, texts) - early_fraction(rotated(solutions, group), texts)


def rotated(items: Sequence[Item], by: int = 1) -> list[Item]:
    """The items from place `by` on, then those before it."""
    return [*items[by:], *items[:by]]


def repetition(text: str) -> float:
    """Share of pairs of neighbouring words that stood in the text before; 0 for shorter texts."""
    pairs = list(pairwise(text.split()))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def outside(value: float, low: float | None, high: float | None) -> bool:
    """Whether a value lies beyond a bound; None is no bound."""
    return (low is not None and value < low) or (high is not None and value > high)


def range_text(low: float | None, high: float | None) -> str:
    """`at least 0.1`, `at most 0.3`, `0.5 to 2`."""
    if low is None:
        return f"at most {high:g}" if high is not None else "anything"
    return f"at least {low:g}" if high is None else f"{low:g} to {high:g}"
