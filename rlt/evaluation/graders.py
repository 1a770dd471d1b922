r"""Graders give every answer one verdict with a reason. No answer makes them raise an exception.

An answer is the text of a solution block (see `rlt.evaluation.answers.extract_answer`). An answer
that hangs the verifier, breaks it or fills its memory is graded incorrect. Its reason says so
("timeout", "error: …"), and `eval/grading_error_rate` counts it.

Only a score of 1 counts as correct. reasoning-gym gives partial credit, which stays in
`Verdict.score`. `conf/benchmark/*.yaml` and `conf/data/*.yaml` choose the grader, and
`rlt stage=evaluate`, RL of a student and the correctness reward use it. A grader is a context
manager, since it may hold a process that verifies.
"""

import re
from typing import Any

from rlt.data.grader import EMPTY_ANSWER, Grader, Verdict, decided
from rlt.data.problem import Problem
from rlt.evaluation.answers import unwrap_boxed
from rlt.evaluation.sandbox import Sandbox, VerifierError, VerifierTimeoutError

NO_SOLUTION_BLOCK = "no solution block"


def normalise(text: str) -> str:
    """Fold the case of a text, collapse its white space to single spaces and strip it."""
    return " ".join(text.split()).casefold()


class ExactGrader(Grader):
    """Accepts the text of the solution, up to case and white space."""

    def grade_one(self, problem: Problem, answer: str) -> Verdict:
        """Compare the two texts."""
        return decided(normalise(answer) == normalise(problem.solution), answer.strip())


class _SandboxedGrader(Grader):
    """A grader whose verifier runs in a process that is killed when it takes too long."""

    def __init__(self, function: str, timeout_seconds: float, memory_mb: int) -> None:
        self.sandbox = Sandbox(function, timeout_seconds, memory_mb)

    def close(self) -> None:
        """End the process. The next answer starts a new one."""
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
    r"""Accepts what equals the solution mathematically, by math-verify.

    The last `\boxed{…}` is compared, or the answer itself if nothing is boxed.

    Args:
        timeout_seconds: how long math-verify may take for one answer, in seconds.
        memory_mb: how much memory it may take, in MiB.
    """

    def __init__(self, timeout_seconds: float = 5.0, memory_mb: int = 1024) -> None:
        super().__init__("maths", timeout_seconds, memory_mb)

    def grade_one(self, problem: Problem, answer: str) -> Verdict:
        """Compare texts and words directly, and all else by math-verify."""
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
    """Asks the verifier of the reasoning-gym task that generated the problem.

    The task and its entry come from `problem.metadata` (`task`, `entry`), where the reasoning-gym
    source stores them. Without an entry, one is made of question and solution, and `task` must be
    given.

    Args:
        task: the task of problems whose metadata names none.
        timeout_seconds: how long the verifier may take for one answer, in seconds.
        memory_mb: how much memory it may take, in MiB.
    """

    def __init__(
        self, task: str | None = None, timeout_seconds: float = 5.0, memory_mb: int = 1024
    ) -> None:
        super().__init__("reasoning_gym", timeout_seconds, memory_mb)
        self.task = task

    def grade_one(self, problem: Problem, answer: str) -> Verdict:
        """Score the answer by the task's verifier.

        Raises:
            ValueError: no task is named.
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
    """Accepts the letter of the right choice, or the text of that choice.

    `problem.solution` is the letter, and `problem.metadata["choices"]` may map letters to texts. An
    answer with several letters that does not state which of them is meant makes no choice.

    Args:
        letters: the letters of the choices.

    Raises:
        ValueError: `letters` are not at least two capitals.
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
        """Compare the letter that the answer chooses.

        Raises:
            ValueError: the solution is not one of the letters.
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
        """Find the letter that the answer chooses, or None if it makes no clear choice.

        Args:
            answer: the text of the answer.
            choices: letter → text of the choice, which may be empty.
        """
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
    """Remove surrounding Markdown emphasis, a lone currency sign and a final full stop."""
    text = text.strip()
    while len(text) > 4 and text.startswith("**") and text.endswith("**"):
        text = text[2:-2].strip()
    unescaped = re.sub(r"\\\$", "", text)
    if unescaped.count("$") == 1:
        text = re.sub(r"(?<!\\)\$", "", text)
    return text.strip().removesuffix(".")


def _compact(text: str) -> str:
    """Remove dollar signs, and white space that does not stand between two numbers."""
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)|(?<!\\)\$", "", text)


def _as_word(text: str) -> str | None:
    r"""Return the text of `\text{…}` or a plain word of at least four letters, case folded."""
    match = re.fullmatch(
        r"\s*\\(?:text|textbf|mathrm|mbox)\s*\{([^{}\d]*)\}\s*|\s*([A-Za-z]{4,})\.?\s*", text
    )
    return None if match is None else normalise(match[1] or match[2] or "").strip(" .()")
