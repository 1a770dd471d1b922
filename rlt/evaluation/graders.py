r"""Graders: is this answer right? One verdict with a reason for every answer, never an exception.

`answer` is the text of a solution block (see `rlt.evaluation.answers.extract_answer`). An answer
that hangs the verifier, breaks it or fills its memory is graded incorrect, and its reason says so
("timeout", "error: …"), so that `eval/grading_error_rate` can show it.

Only `score >= 1` counts as correct: reasoning-gym gives partial credit, kept in `Verdict.score`.
Chosen in `conf/benchmark/*.yaml` and `conf/data/*.yaml`; used by `rlt stage=evaluate` and by the
correctness reward. Graders that verify in a process of their own are context managers.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from rlt.data.problem import Problem
from rlt.evaluation.answers import unwrap_boxed
from rlt.evaluation.sandbox import Sandbox, VerifierError, VerifierTimeoutError

NO_SOLUTION_BLOCK = "no solution block"
EMPTY_ANSWER = "empty answer"


@dataclass(frozen=True)
class Verdict:
    """What a grader says about one answer.

    Attributes:
        correct: whether the score is full.
        extracted: the part of the answer that was compared.
        reason: "correct", "wrong", "empty answer", "no solution block", "no choice letter",
            "unreadable", "unsafe answer", "timeout" or "error: …".
        score: the verifier's own score, with partial credit where it gives any.
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
    """The verdict of a comparison that could be made."""
    return Verdict(correct, extracted, "correct" if correct else "wrong", float(correct))


class Grader(Protocol):
    """Subclasses say how one answer is graded; the rest follows."""

    def grade_one(self, problem: Problem, answer: str) -> Verdict:
        """The verdict on one non-empty answer."""
        ...

    def grade(self, problem: Problem, answers: Sequence[str]) -> list[Verdict]:
        """One verdict per answer to the same problem."""
        return self.grade_all([(problem, answer) for answer in answers])

    def grade_all(self, pairs: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """One verdict per pair, in order; equal answers to one problem are graded once."""
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
        """Give back what the grader holds; it may be used again."""
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


def normalise(text: str) -> str:
    """Case folded, white space collapsed to single spaces and stripped."""
    return " ".join(text.split()).casefold()


class ExactGrader(Grader):
    """Equal strings, up to case and white space."""

    def grade_one(self, problem: Problem, answer: str) -> Verdict:
        """Return whether the answer equals the solution, ignoring case and white space."""
        return decided(normalise(answer) == normalise(problem.solution), answer.strip())


class _SandboxedGrader(Grader):
    """A grader whose verifier runs in a process that is killed when it takes too long."""

    def __init__(self, function: str, timeout_seconds: float, memory_mb: int) -> None:
        self.sandbox = Sandbox(function, timeout_seconds, memory_mb)

    def close(self) -> None:
        self.sandbox.close()

    def _verify(self, answer: str, **arguments: Any) -> Verdict:
        try:
            result = self.sandbox.call(answer=answer, **arguments)
        except VerifierTimeoutError:
            return Verdict(False, answer, "timeout")
        except VerifierError as error:
            return Verdict(False, answer, f"error: {error}")
        score, extracted = result["score"], result["extracted"]
        correct = score >= 1.0
        reason = result["reason"] or ("correct" if correct else "wrong")
        return Verdict(correct, extracted, reason, score)


class MathGrader(_SandboxedGrader):
    r"""Mathematical equality by math-verify, of the last `\boxed{…}`, else of the answer itself."""

    def __init__(self, timeout_seconds: float = 5.0, memory_mb: int = 1024) -> None:
        super().__init__("maths", timeout_seconds, memory_mb)

    def grade_one(self, problem: Problem, answer: str) -> Verdict:
        """Return whether the answer equals the solution as mathematics.

        A solution that is a word is compared as a word. A verifier that fails or takes too long
        gives a wrong verdict with the reason.
        """
        boxed = unwrap_boxed(answer)
        stated = _without_markup(answer if boxed is None else boxed)
        if not stated:
            return Verdict(False, "", EMPTY_ANSWER)
        if _compact(stated) == _compact(problem.solution):
            return decided(True, stated)
        word = _as_word(problem.solution)
        if word is not None:  # read as maths, a word is a product of letters: even = neve
            said = _as_word(stated) or normalise(stated).strip(" .()")
            return decided(said == word, stated)
        return self._verify(stated, solution=problem.solution)


class ReasoningGymGrader(_SandboxedGrader):
    """The verifier of the reasoning-gym task that generated the problem.

    The task and its entry come from `problem.metadata` (`task`, `entry`), as the reasoning-gym
    source stores them. Without an entry, question and solution stand in for it, and `task` must be
    given.
    """

    def __init__(
        self, task: str | None = None, timeout_seconds: float = 5.0, memory_mb: int = 1024
    ) -> None:
        super().__init__("reasoning_gym", timeout_seconds, memory_mb)
        self.task = task

    def grade_one(self, problem: Problem, answer: str) -> Verdict:
        """Return the verdict of the problem's own task, which may score between 0 and 1.

        Raises:
            ValueError: neither the problem nor the grader names a task.
        """
        entry = dict(problem.metadata.get("entry") or {})
        entry.setdefault("question", problem.question)
        entry.setdefault("answer", problem.solution)
        entry.setdefault("metadata", {})
        task = problem.metadata.get("task") or entry["metadata"].get("source_dataset") or self.task
        if not task:
            raise ValueError(
                f"problem {problem.id} names no reasoning-gym task in its metadata; set the "
                "grader's `task`, or use the grader that fits the data set's source"
            )
        return self._verify(answer.strip(), task=task, entry=entry)


class MultipleChoiceGrader(Grader):
    """A choice letter, found where answers state one, or the right choice's own text.

    `problem.solution` is the letter; `problem.metadata["choices"]`, if there, maps letters to
    texts. Several letters and no statement which of them is meant: no choice.
    """

    def __init__(self, letters: str = "ABCD") -> None:
        if not re.fullmatch("[A-Z]{2,}", letters):
            raise ValueError(f"letters is {letters!r}, must be capitals, at least two: 'ABCD'")
        self.letters = letters
        article = r"A(?= (?!(?:is|or|and|nor)\b)[a-z])"  # as in "A photon"
        one = rf"([{letters}])(?![\w'’-])(?<!{article})"
        named, opened = r"(?i:answer|choice|option)", r"[\s*_(\[{$\\]*(?:text\{)?\(?"
        self._alone = re.compile(
            rf"\W*(?:(?:text|textbf|mathrm)\{{)?\W*([{letters}{letters.lower()}])\W*"
        )
        self._stated = re.compile(
            rf"\b(?:{named}(?:(?i:\s+is)|\s*:)?|(?i:is))[:\s]*{named}?{opened}{one}"
        )
        self._leading = re.compile(rf"\W*([{letters}])[).:\]*]")
        self._standing = re.compile(rf"(?<![\w'’-]){one}")

    def grade_one(self, problem: Problem, answer: str) -> Verdict:
        """Return whether the letter that the answer chooses is the solution.

        Raises:
            ValueError: the problem's solution is not one of the grader's letters.
        """
        if problem.solution not in self.letters:
            raise ValueError(
                f"problem {problem.id} has solution {problem.solution!r}, must be one letter of "
                f"{self.letters}; use another grader or set `letters`"
            )
        letter = self.find_letter(answer, problem.metadata.get("choices") or {})
        if letter is None:
            return Verdict(False, "", "no choice letter")
        return decided(letter == problem.solution, letter)

    def find_letter(self, answer: str, choices: dict[str, str]) -> str | None:
        """The letter that the answer chooses, None if it chooses none or leaves it open."""
        boxed = unwrap_boxed(answer)
        stated = (answer if boxed is None else boxed).strip()
        alone = self._alone.fullmatch(stated)
        if alone:
            return alone[1].upper()
        for letter, text in choices.items():
            if normalise(stated).rstrip(".") == normalise(text).rstrip("."):
                return letter
        said = self._stated.findall(stated)
        if said:
            return str(said[-1])
        leading = self._leading.match(stated)
        if leading:
            return leading[1]
        standing = set(self._standing.findall(stated))
        return standing.pop() if len(standing) == 1 else None


def _without_markup(text: str) -> str:
    """Without surrounding Markdown emphasis, without a lone currency sign or full stop."""
    text = text.strip()
    while len(text) > 4 and text.startswith("**") and text.endswith("**"):
        text = text[2:-2].strip()
    unescaped = re.sub(r"\\\$", "", text)
    if unescaped.count("$") == 1:
        text = re.sub(r"(?<!\\)\$", "", text)
    return text.strip().removesuffix(".")


def _compact(text: str) -> str:
    """Without dollar signs, and without white space that does not part two numbers."""
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)|(?<!\\)\$", "", text)


def _as_word(text: str) -> str | None:
    r"""The letters inside `\text{…}`, or a plain word of four letters or more, case folded."""
    match = re.fullmatch(
        r"\s*\\(?:text|textbf|mathrm|mbox)\s*\{([^{}\d]*)\}\s*|\s*([A-Za-z]{4,})\.?\s*", text
    )
    return None if match is None else normalise(match[1] or match[2] or "").strip(" .()")
