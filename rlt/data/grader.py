"""What a grader is: a judge of the answers to a data set's problems.

`rlt.evaluation.graders` has the graders that rlt ships. Only a score of 1 counts as correct.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from rlt.data.problem import Problem

EMPTY_ANSWER = "empty answer"


@dataclass(frozen=True)
class Verdict:
    """The judgement of one answer.

    Attributes:
        correct: whether the score is full.
        extracted: the part of the answer that was compared.
        reason: "correct", "wrong", "empty answer", "no solution block", "no choice letter",
            "unreadable", "unsafe answer", "timeout" or "error: …".
        score: the verifier's own score, with partial credit where the verifier gives any.
    """

    correct: bool
    extracted: str
    reason: str
    score: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether the verifier, rather than the answer, fell short."""
        return self.reason == "timeout" or self.reason.startswith("error: ")


def decided(correct: bool, extracted: str) -> Verdict:
    """Return the verdict of a comparison that could be made."""
    return Verdict(correct, extracted, "correct" if correct else "wrong", float(correct))


class Grader(Protocol):
    """Judges answers. A subclass implements `grade_one` and inherits the rest."""

    def grade_one(self, problem: Problem, answer: str) -> Verdict:
        """Judge one answer that is not empty.

        Raises:
            ValueError: this grader cannot judge answers to such a problem.
        """
        ...

    def grade(self, problem: Problem, answers: Sequence[str]) -> list[Verdict]:
        """Judge several answers to one problem, one verdict per answer, in order."""
        return self.grade_all([(problem, answer) for answer in answers])

    def grade_all(self, pairs: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """Judge pairs of a problem and an answer, one verdict per pair, in order.

        Equal answers to one problem are judged once.
        """
        verdicts: dict[tuple[str, str], Verdict] = {}
        for problem, answer in pairs:
            key = (problem.id, answer)
            if key not in verdicts:
                verdicts[key] = (
                    self.grade_one(problem, answer)
                    if answer.strip()
                    else Verdict(False, "", EMPTY_ANSWER)
                )
        return [verdicts[problem.id, answer] for problem, answer in pairs]

    def close(self) -> None:
        """Release what the grader holds. The grader can be used again afterwards."""
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
