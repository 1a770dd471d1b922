"""The `data` node of a config: a source, how its rows are checked, and how they are split.

The split is by content: a hash of the question decides, so neither a problem nor a question
stands on both sides, in whatever order or number the rows come (the paper has no validation set).
What is not held out may be divided once more, by another hash, into named parts that train
different models, such as the student inside a reward and the teacher that it rewards.
Used by every stage: `rlt stage=teacher_rl data=gsm_symbolic data.validation_fraction=0.1`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlt.config.suggestions import did_you_mean
from rlt.data.problem import Problem, content_hash
from rlt.data.rows import SHOWN_ROWS, ProblemSet, Source, collect_problems


@dataclass(frozen=True)
class DataSplit:
    """Problems in source order, and the counts that belong into a manifest."""

    train: list[Problem]
    validation: list[Problem]
    report: dict[str, Any]


def split_point(key: str, purpose: str = "validation split") -> float:
    """A number in [0, 1) that depends on the text and the purpose alone.

    What was split for one purpose must be split for another with numbers of its own.
    """
    return int(content_hash(purpose, key), 16) / 2**64


def in_validation(key: str, share: float) -> bool:
    """Whether a text belongs to the validation side; a larger share keeps what a smaller chose."""
    return split_point(key) < share


def split_problems(
    problems: Sequence[Problem], share: float, purpose: str = "validation split"
) -> tuple[list[Problem], list[Problem]]:
    """Train and validation; each gets at least one question if there are two and share > 0."""
    if not 0 <= share < 1:
        raise ValueError(f"data.validation_fraction={share}; it must be at least 0 and less than 1")
    points = {problem.question: split_point(problem.question, purpose) for problem in problems}
    questions = sorted(points, key=lambda question: points[question])
    n_chosen = sum(point < share for point in points.values())
    if share > 0 and len(questions) > 1:
        n_chosen = min(max(n_chosen, 1), len(questions) - 1)
    chosen = set(questions[:n_chosen])
    train = [problem for problem in problems if problem.question not in chosen]
    return train, [problem for problem in problems if problem.question in chosen]


def fingerprint_problems(problems: Sequence[Problem]) -> str:
    """Hash over the full contents of the problems, in order."""
    return content_hash(*(json.dumps(vars(problem), sort_keys=True) for problem in problems))


def problems_of_part(
    problems: Sequence[Problem], parts: Mapping[str, float], part: str
) -> list[Problem]:
    """The problems of one named part, in their order.

    A hash of the question decides, as in `split_problems`, so a part keeps its problems whatever
    other rows there are.

    Args:
        parts: name → share of the problems; the shares add up to 1.
    """
    before = 0.0
    for name, share in parts.items():
        if name == part:
            break
        before += share
    low, high = before, before + parts[part] if part != list(parts)[-1] else 1.0
    return [p for p in problems if low <= split_point(p.question, "named parts") < high]


class Behaviour(Protocol):
    """Tells what an explanation does, so that it can be counted.

    Attributes:
        names: everything that it may say.
        good: which of them are what a teacher should do.
    """

    names: tuple[str, ...]
    good: tuple[str, ...]

    def __call__(
        self, question: str, solution: str, explanation: str, closed: bool = True
    ) -> str: ...


def behaviour_rates(behaviours: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """`behaviour/<name>_rate` of every name, over at least one explanation."""
    return {f"behaviour/{n}_rate": behaviours.count(n) / len(behaviours) for n in names}


class ProblemData:
    """Loads problems from a source.

    Args:
        source: yields raw rows (`rows()`) and says what it is (`describe()`).
        on_bad_row: `stop` at broken rows, showing them, or `skip` and count them.
        validation_fraction: share of the questions that is held out.
        parts: name → share of what is not held out; the shares add up to 1. None: undivided.
        part: the one of them to train on; the others are left out.
        max_train: use at most so many training problems, from the start; None: all.
        max_validation: the same for validation.
        max_tokens: limit on system + question + explanation + solution of a row; None: no limit.
        grader: judges answers to these problems; only kept for whoever asks.
        unique: drop repeated problems; False for plain pretraining text.
        behaviour: names what an explanation does; None: teachers' behaviours are not counted.

    Raises:
        ValueError: a limit is below 1, or parts and part do not go together.
    """

    def __init__(
        self,
        source: Source,
        on_bad_row: str = "stop",
        validation_fraction: float = 0.1,
        max_train: int | None = None,
        max_validation: int | None = None,
        max_tokens: int | None = None,
        grader: Any = None,
        unique: bool = True,
        behaviour: Behaviour | None = None,
        parts: Mapping[str, float] | None = None,
        part: str | None = None,
    ) -> None:
        for name, value in (("max_train", max_train), ("max_validation", max_validation)):
            if value is not None and value < 1:
                raise ValueError(
                    f"data.{name}={value}; it must be at least 1, or null for all "
                    "(data.validation_fraction=0 holds out none)"
                )
        _check_parts(parts, part)
        self.parts = parts
        self.part = part
        self.source = source
        self.on_bad_row = on_bad_row
        self.validation_fraction = validation_fraction
        self.max_train = max_train
        self.max_validation = max_validation
        self.max_tokens = max_tokens
        self.grader = grader
        self.unique = unique
        self.behaviour = behaviour

    def load(
        self,
        forbidden: Sequence[str] = (),
        count_tokens: Callable[[str], int] | None = None,
    ) -> DataSplit:
        """Read, check and split.

        Args:
            forbidden: the prompt style's tags; no text may hold one.
            count_tokens: number of tokens of a text; needed if `max_tokens` is set.
        """
        found = collect_problems(
            self.source.rows(),
            self.on_bad_row,
            forbidden,
            count_tokens,
            self.max_tokens,
            self.unique,
        )
        if not found.problems:
            raise ValueError(
                f"no problem is left of {found.read} rows read (bad: {found.bad_per_reason()}); "
                f"check data.source: {self.source.describe()}"
            )
        train, validation = split_problems(found.problems, self.validation_fraction)
        if self.parts is not None and self.part is not None:
            train = problems_of_part(train, self.parts, self.part)
            if not train:
                raise ValueError(
                    f"data.part={self.part}: none of the {len(found.problems)} problems falls into "
                    f"this part (data.parts={dict(self.parts)}); raise its share, or read more rows"
                )
        train, validation = train[: self.max_train], validation[: self.max_validation]
        return DataSplit(train, validation, self._report(found, train, validation))

    def _report(
        self, found: ProblemSet, train: list[Problem], validation: list[Problem]
    ) -> dict[str, Any]:
        parts = (fingerprint_problems(train), fingerprint_problems(validation))
        return {
            "source": self.source.describe(),
            "read": found.read,
            "kept": len(found.problems),
            "bad": found.bad_per_reason(),
            "bad_rows": [str(bad) for bad in found.bad_rows[:SHOWN_ROWS]],
            "duplicates": found.duplicates_dropped,
            "train": len(train),
            "validation": len(validation),
            **({"part": self.part} if self.part is not None else {}),
            "fingerprint": content_hash(*parts),
        }


def _check_parts(parts: Mapping[str, float] | None, part: str | None) -> None:
    if (parts is None) != (part is None):
        raise ValueError(
            f"data.parts={parts}, data.part={part}: set both, for example "
            "data.parts={reward_student: 0.5, teacher: 0.5} data.part=teacher, or neither"
        )
    if parts is None:
        return
    shares = list(parts.values())
    if any(share <= 0 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(
            f"data.parts={dict(parts)}: shares are above 0 and add up to 1 "
            "(data.validation_fraction is held out before that)"
        )
    if part not in parts:
        raise ValueError(
            f"data.part={part}: data.parts has {', '.join(parts)}{did_you_mean(str(part), parts)}"
        )
