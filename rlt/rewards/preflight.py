"""Reward preflight: does a reward tell good explanations from bad ones, before any RL is paid for?

A reward that cannot is not worth hours of RL: the policy would learn what the reward's student
happens to find likely. Explanations of known quality are scored, and the area under the ROC curve
is taken for the whole reward and for each of its terms (0.5 is chance, 1 tells them all apart).

Where labels come from:

    corruptions  the data's own explanations against damaged copies of them
    behaviour    a classifier of the data node says what an explanation does
    verifier     the data's grader says whether an explanation ends in the right answer

`rlt stage=score` prints the table for any explanations, `rlt stage=teacher_rl` before its first
step. The paper has no counterpart; its reward student was tuned for the task beforehand.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlt.config.suggestions import did_you_mean
from rlt.evaluation.answers import unwrap_boxed
from rlt.evaluation.statistics import Interval, roc_area_interval
from rlt.rewards.reward import Reward, RewardTable

WHOLE = "reward"  # what the areas of the whole reward are called beside those of its terms
_ENOUGH = 5  # good and bad ones each, below which an area says nothing


def altered_digit(explanation: str, solution: str, other: str, rng: random.Random) -> str:
    """One digit is another: the last of a result after an equals sign, if there is any."""
    places = [m.end() - 1 for m in re.finditer(r"=\s*-?\d+", explanation)]
    places = places or [m.start() for m in re.finditer(r"\d", explanation)]
    if not places:
        return explanation
    place = rng.choice(places)
    digit = (int(explanation[place]) + rng.randrange(1, 10)) % 10
    return f"{explanation[:place]}{digit}{explanation[place + 1 :]}"


def truncated(explanation: str, solution: str, other: str, rng: random.Random) -> str:
    """The first half of its lines, or of its words if there is one line."""
    separator = "\n" if "\n" in explanation.strip() else " "
    parts = explanation.strip().split(separator)
    return separator.join(parts[: len(parts) // 2])


def bare_solution(explanation: str, solution: str, other: str, rng: random.Random) -> str:
    """The solution alone, without a way to it: a leak."""
    return solution


def other_problem(explanation: str, solution: str, other: str, rng: random.Random) -> str:
    """The explanation of another problem."""
    return other


CORRUPTIONS: dict[str, Callable[[str, str, str, random.Random], str]] = {
    "other_problem": other_problem,
    "altered_digit": altered_digit,
    "truncated": truncated,
    "bare_solution": bare_solution,
}


@dataclass(frozen=True)
class Preflight:
    """How much is looked at, and what is taken for too little (`preflight` of a recipe).

    Args:
        problems: how many of the problems with an explanation are looked at.
        corruptions: how copies of their explanations are damaged; names of `CORRUPTIONS`.
        lowest_area: a whole reward with a smaller area is warned of.

    Raises:
        ValueError: a value is out of its range, or there is no such corruption.
    """

    problems: int
    corruptions: Sequence[str]
    lowest_area: float

    def __post_init__(self) -> None:
        if self.problems < 2:
            raise ValueError(f"preflight.problems={self.problems}: it must be at least 2")
        if not 0 <= self.lowest_area <= 1:
            raise ValueError(
                f"preflight.lowest_area={self.lowest_area}: an area is between 0 and 1"
            )
        for name in self.corruptions:
            if name not in CORRUPTIONS:
                raise ValueError(
                    f"preflight.corruptions has {name!r}: choose among "
                    f"{', '.join(CORRUPTIONS)}{did_you_mean(name, CORRUPTIONS)}"
                )

    def warning(self, areas: Sequence["Area"]) -> str | None:
        """One sentence about the labels that the whole reward cannot tell apart, with a cure."""
        low = [
            f"{area.against} ({area.interval.mean:.2f})"
            for area in areas
            if area.term == WHOLE and area.interval.mean < self.lowest_area
        ]
        if not low:
            return None
        return (
            f"the reward hardly tells good explanations from {', '.join(low)}: RL would not learn "
            "what good is; take a reward student that can do the task (distill one from worked "
            "explanations: arm=able_teacher), or another reward (preflight.lowest_area="
            f"{self.lowest_area:g})"
        )


@dataclass(frozen=True)
class Area:
    """How well one number tells good explanations from those of one kind.

    Attributes:
        against: what the bad ones are: a corruption, or who labelled them.
        term: `reward`, or a term by reduction, with the sign that it has in the reward.
        good, bad: how many there were.
        interval: area under the ROC curve, 95 % interval over problems.
    """

    against: str
    term: str
    good: int
    bad: int
    interval: Interval

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> "Area":
        """The inverse of `row`."""
        interval = Interval(row["area"], row["low"], row["high"])
        return cls(row["against"], row["term"], row["good"], row["bad"], interval)

    def row(self) -> dict[str, Any]:
        """As it is written to preflight.json."""
        return {
            "against": self.against, "term": self.term, "good": self.good, "bad": self.bad,
            "area": self.interval.mean, "low": self.interval.low, "high": self.interval.high,
        }  # fmt: skip


def corrupted(
    explanations: Sequence[str], solutions: Sequence[str], name: str, seed: int
) -> list[str | None]:
    """Damaged copies; None where the damage changes nothing."""
    copies: list[str | None] = []
    for n, explanation in enumerate(explanations):
        other = explanations[(n + 1) % len(explanations)]
        rng = random.Random(f"{name} {seed} {n}")
        copy = CORRUPTIONS[name](explanation, solutions[n], other, rng)
        copies.append(copy if copy.strip() != explanation.strip() else None)
    return copies


def ends_in(explanation: str) -> str:
    r"""What a verifier takes for an explanation's result.

    It is the last `\boxed{…}`, else what follows the last equals sign of the last line, else the
    last number there, else the whole line.
    """
    boxed = unwrap_boxed(explanation)
    if boxed is not None:
        return boxed
    lines = explanation.strip().splitlines()
    last = lines[-1].strip() if lines else ""
    if "=" in last:
        return last.rpartition("=")[2].strip()
    numbers = re.findall(r"-?\d+(?:\.\d+)?", last)
    return str(numbers[-1]) if numbers else last


def signed_columns(reward: Reward, table: RewardTable) -> dict[str, list[float]]:
    """The whole reward and each of its terms by reduction, the higher the better."""
    columns = {WHOLE: list(table.rewards)}
    for name, term in reward.terms.items():
        for how in term.coefficients:
            values = table.terms[f"{name}/{how}"]
            columns[f"{name}/{how}"] = [term.sign * value for value in values]
    return columns


def areas(
    columns: Mapping[str, Sequence[float]],
    labels: Mapping[str, Sequence[bool | None]],
    problems: Sequence[str],
) -> list[Area]:
    """Areas of every column against every kind of label, where there are enough of both.

    Args:
        columns: name → one number for each of N explanations.
        labels: kind → for each explanation whether it is good; None where it does not take part.
        problems: the id of each explanation's problem.
    """
    found = []
    for against, marks in labels.items():
        taking_part = [n for n, mark in enumerate(marks) if mark is not None]
        good = [bool(marks[n]) for n in taking_part]
        if min(sum(good), len(good) - sum(good)) < _ENOUGH:
            continue
        owners = [problems[n] for n in taking_part]
        for term, values in columns.items():
            interval = roc_area_interval([values[n] for n in taking_part], good, owners)
            found.append(Area(against, term, sum(good), len(good) - sum(good), interval))
    return found
