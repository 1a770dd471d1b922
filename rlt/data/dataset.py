"""The `data` node of a config: a source of problems, and how they are checked and split.

A hash of the question decides whether a problem is held out for validation. Therefore no question
is on both sides of the split, whatever the order and the number of the rows. (The paper has no
validation set.) The other problems can be divided once more, by another hash, into named parts that
train different models, such as the student inside a reward and the teacher that it rewards.

Every stage uses this node: `rlt stage=teacher_rl data=gsm_symbolic data.validation_fraction=0.1`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlt.config.suggestions import did_you_mean
from rlt.data.grader import Grader
from rlt.data.problem import Problem, content_hash
from rlt.data.row_checks import collect_problems
from rlt.data.rows import SHOWN_ROWS, ProblemSet, Source


@dataclass(frozen=True)
class DataSplit:
    """The problems of a source after the split.

    Attributes:
        train: training problems, in the order of the source.
        validation: held-out problems, in the order of the source.
        report: counts and fingerprint of the data, for the manifest of a run.
    """

    train: list[Problem]
    validation: list[Problem]
    report: dict[str, Any]


def split_point(key: str, purpose: str = "validation split") -> float:
    """Return a number in [0, 1) that depends on the text and the purpose alone.

    Splits with different purposes are independent of each other.

    Args:
        key: the text that is hashed, such as a question.
        purpose: name of the split.
    """
    return int(content_hash(purpose, key), 16) / 2**64


def in_validation(key: str, share: float) -> bool:
    """Whether a text is held out. With a larger share, more texts are held out and none fewer."""
    return split_point(key) < share


def split_problems(
    problems: Sequence[Problem], share: float, purpose: str = "validation split"
) -> tuple[list[Problem], list[Problem]]:
    """Split problems into training and validation problems by a hash of the question.

    If `share` is above 0 and there are two questions or more, each side gets at least one.

    Args:
        problems: the problems to split.
        share: fraction of the questions that is held out, at least 0 and less than 1.
        purpose: name of the split; different names give independent splits.

    Returns:
        Training and validation problems, each in the order of `problems`.

    Raises:
        ValueError: `share` is out of range.
    """
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
    """Return a hash over the full contents of the problems, in their order."""
    return content_hash(*(json.dumps(vars(problem), sort_keys=True) for problem in problems))


def problems_of_part(
    problems: Sequence[Problem], parts: Mapping[str, float], part: str
) -> list[Problem]:
    """Return the problems of one named part, in their order.

    A hash of the question decides, as in `split_problems`, so the part of a problem does not depend
    on the other problems.

    Args:
        problems: the problems to divide.
        parts: share of the problems of each part; the shares add up to 1.
        part: name of the part to return.
    """
    before = 0.0
    for name, share in parts.items():
        if name == part:
            break
        before += share
    low, high = before, before + parts[part] if part != list(parts)[-1] else 1.0
    return [p for p in problems if low <= split_point(p.question, "named parts") < high]


class Behaviour(Protocol):
    """Classifies explanations by what they do, so that each behaviour can be counted.

    Attributes:
        names: all behaviours.
        good: the behaviours that a teacher should show.
    """

    names: tuple[str, ...]
    good: tuple[str, ...]

    def __call__(self, question: str, solution: str, explanation: str, closed: bool = True) -> str:
        """Return the behaviour of an explanation, one of `names`.

        Args:
            question: the question of the problem.
            solution: its solution.
            explanation: the explanation.
            closed: whether the teacher has ended its explanation with the end tag.
        """
        ...


def behaviour_rates(behaviours: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """Return the rate of every behaviour name, keyed `behaviour/<name>_rate`.

    Args:
        behaviours: the behaviour of each explanation; at least one.
        names: all behaviours.
    """
    return {f"behaviour/{n}_rate": behaviours.count(n) / len(behaviours) for n in names}


class ProblemData:
    """Loads problems from a source.

    Args:
        source: yields raw rows (`rows()`) and describes itself (`describe()`).
        on_bad_row: `stop` raises an error that shows the broken rows; `skip` skips and counts them.
        validation_fraction: fraction of the questions that is held out.
        max_train: largest number of training problems, the first ones; None takes all.
        max_validation: largest number of validation problems, the first ones; None takes all.
        max_tokens: largest number of tokens of a row, which has system prompt, question,
            explanation and solution; None is no limit.
        grader: grades answers to these problems. It is stored here for other code and not used.
        unique: drop repeated problems; False is for plain pretraining text.
        behaviour: classifies explanations; None does not count the behaviours of teachers.
        parts: share of each named part of the problems that are not held out; the shares add up to
            1. None does not divide them.
        part: the part to train on; the others are not used. None if and only if `parts` is None.

    Raises:
        ValueError: a limit is less than 1, or `parts` and `part` do not fit together.
    """

    def __init__(
        self,
        source: Source,
        on_bad_row: str = "stop",
        validation_fraction: float = 0.1,
        max_train: int | None = None,
        max_validation: int | None = None,
        max_tokens: int | None = None,
        grader: Grader | None = None,
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
        """Read the source, check its rows and split the problems.

        Args:
            forbidden: strings that no text may contain, such as the tags of the prompt style.
            count_tokens: returns the number of tokens of a text; needed if `max_tokens` is set.

        Raises:
            BadRowsError: there are broken rows, and `on_bad_row` is `stop`.
            ValueError: no problem is left, or an option is out of range.
        """
        problem_set = collect_problems(
            self.source.rows(),
            self.on_bad_row,
            forbidden,
            count_tokens,
            self.max_tokens,
            self.unique,
        )
        if not problem_set.problems:
            raise ValueError(
                f"no problem is left of {problem_set.read} rows read (bad: "
                f"{problem_set.bad_per_reason()}); check data.source: {self.source.describe()}"
            )
        train, validation = split_problems(problem_set.problems, self.validation_fraction)
        if self.parts is not None and self.part is not None:
            train = problems_of_part(train, self.parts, self.part)
            if not train:
                raise ValueError(
                    f"data.part={self.part}: none of the {len(problem_set.problems)} problems "
                    f"falls into this part (data.parts={dict(self.parts)}); raise its share, or "
                    "read more rows"
                )
        train, validation = train[: self.max_train], validation[: self.max_validation]
        return DataSplit(train, validation, self._report(problem_set, train, validation))

    def _report(
        self, problem_set: ProblemSet, train: list[Problem], validation: list[Problem]
    ) -> dict[str, Any]:
        fingerprints = (fingerprint_problems(train), fingerprint_problems(validation))
        return {
            "source": self.source.describe(),
            "read": problem_set.read,
            "kept": len(problem_set.problems),
            "bad": problem_set.bad_per_reason(),
            "bad_rows": [str(bad) for bad in problem_set.bad_rows[:SHOWN_ROWS]],
            "duplicates": problem_set.duplicates_dropped,
            "train": len(train),
            "validation": len(validation),
            **({"part": self.part} if self.part is not None else {}),
            "fingerprint": content_hash(*fingerprints),
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
            f"data.parts={dict(parts)}: the shares must be above 0 and add up to 1 "
            "(data.validation_fraction is held out before that)"
        )
    if part not in parts:
        raise ValueError(
            f"data.part={part}: data.parts has {', '.join(parts)}{did_you_mean(str(part), parts)}"
        )
