"""Graders on hand-labelled answers: right, wrong and tricky."""

from pathlib import Path
from typing import Any

import pytest

from rlt.evaluation.graders import (
    ExactGrader,
    MathGrader,
    MultipleChoiceGrader,
    ReasoningGymGrader,
    Verdict,
)
from rlt.evaluation.sandbox import Sandbox, VerifierTimeoutError
from tests.evaluation.graded import COUNTDOWN, asked
from tests.evaluation.labelled_answers import RIGHT, WRONG


@pytest.mark.parametrize(
    ("solution", "answer", "correct"),
    [
        ("6", "6", True),
        ("6", " 6\n", True),
        ("6", "7", False),
        ("6", "66", False),
        ("New  York", "new york", True),
        ("New York", "NewYork", False),
    ],
)
def test_exact_grader(solution: str, answer: str, correct: bool) -> None:
    [verdict] = ExactGrader().grade(asked(solution), [answer])
    reason = "correct" if correct else "wrong"
    assert verdict == Verdict(correct, answer.strip(), reason, float(correct))


def test_empty_answers_never_reach_a_verifier() -> None:
    grader = MathGrader()
    assert grader.grade(asked("0"), ["", "  \n"]) == [Verdict(False, "", "empty answer")] * 2
    assert grader.grade(asked("0"), [r"\boxed{}"]) == [Verdict(False, "", "empty answer")]
    assert grader.sandbox.pid is None


@pytest.mark.parametrize(("solution", "answer"), RIGHT)
def test_maths_answers_that_are_right(maths: MathGrader, solution: str, answer: str) -> None:
    [verdict] = maths.grade(asked(solution), [answer])
    assert (verdict.correct, verdict.reason, verdict.score) == (True, "correct", 1.0)


@pytest.mark.parametrize(("solution", "answer"), WRONG)
def test_maths_answers_that_are_wrong(maths: MathGrader, solution: str, answer: str) -> None:
    [verdict] = maths.grade(asked(solution), [answer])
    assert (verdict.correct, verdict.reason, verdict.score) == (False, "wrong", 0.0)


@pytest.mark.parametrize("answer", ["{", "}", "\\", "$", "%", r"\frac{", "\x00", "🙂", "no idea"])
def test_what_is_no_maths_is_incorrect_and_no_crash(maths: MathGrader, answer: str) -> None:
    verdict, after = maths.grade(asked("5"), [answer, "10/2"])
    assert not verdict.correct
    assert after.correct


def test_equal_answers_are_graded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def call(self: Sandbox, **arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        raise VerifierTimeoutError

    monkeypatch.setattr(Sandbox, "call", call)
    verdicts = MathGrader().grade_all(
        [(asked("5"), "1"), (asked("5"), "1"), (asked("6"), "1"), (asked("5"), "5")]
    )
    assert [verdict.reason for verdict in verdicts] == ["timeout"] * 3 + ["correct"]
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("7*8 - 6", 1.0),
        ("8 * 7-6", 1.0),
        ("-6 + 7*8", 1.0),
        ("(7*8) - 6", 1.0),
        ("7*8 - 6 + 0*6", 0.05),  # a number too many
        ("50", 0.05),
        ("7*8 - 6 = 50", 0.01),
        ("7*8 -", 0.01),
        ("fifty", 0.01),
    ],
)
def test_countdown_by_its_own_verifier(gym: ReasoningGymGrader, answer: str, score: float) -> None:
    [verdict] = gym.grade(COUNTDOWN, [answer])
    assert verdict.score == score
    assert verdict.correct == (score == 1.0)


def test_partial_credit_is_kept_but_not_correct(gym: ReasoningGymGrader) -> None:
    entry = {"question": "?", "answer": "12", "metadata": {}}
    problem = asked("12", task="chain_sum", entry=entry)
    verdicts = gym.grade(problem, ["12", "+12.0", "12 or so", "13"])
    assert [v.correct for v in verdicts] == [True, True, False, False]
    assert [v.score for v in verdicts] == [1.0, 1.0, 2 / 8, 0.0]


def test_the_task_may_come_from_the_entry_or_the_grader() -> None:
    named = asked("12", entry={"answer": "12", "metadata": {"source_dataset": "chain_sum"}})
    with ReasoningGymGrader() as grader, ReasoningGymGrader(task="chain_sum") as told:
        assert grader.grade(named, ["12"])[0].correct
        assert told.grade(asked("12"), ["12"])[0].correct
        with pytest.raises(ValueError, match="names no reasoning-gym task"):
            grader.grade(asked("12"), ["12"])
        unknown = asked("12", task="no_such_task")
        assert grader.grade(unknown, ["12"])[0].reason.startswith("error: ValueError")


CHOICES = {"A": "The photon", "B": "The gluon", "C": "D-glucose", "D": "A graviton"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("C", "C"),
        ("c", "C"),
        ("(C)", "C"),
        ("C.", "C"),
        ("**C**", "C"),
        (r"\boxed{C}", "C"),
        (r"$\boxed{\text{C}}$", "C"),
        (r"\boxed{\text{(B)}}", "B"),
        (r"A looks right, but \boxed{D}", "D"),
        ("The answer is C.", "C"),
        ("The correct answer is (C) because D decays.", "C"),
        ("Answer: B", "B"),
        ("ANSWER: **B**", "B"),
        ("The right choice is option D)", "D"),
        ("At first the answer is A. On reflection the answer is B.", "B"),
        ("B) The gluon", "B"),
        ("C: D-glucose", "C"),
        ("the gluon", "B"),
        ("D-glucose", "C"),
        ("A graviton.", "D"),
        ("I choose D", "D"),
        ("Hence B is right.", "B"),
        ("A is right", "A"),
        ("A or B", None),
        ("The answer is not A but either B or C", None),
        ("A particle without mass", None),
        ("E", None),
        ("none of them", None),
        ("ABCD", None),
    ],
)
def test_the_letter_that_an_answer_chooses(answer: str, letter: str | None) -> None:
    grader = MultipleChoiceGrader()
    assert grader.find_letter(answer, CHOICES) == letter
    [verdict] = grader.grade(asked("C", choices=CHOICES), [answer])
    assert verdict.correct == (letter == "C")
    if letter is None:
        assert verdict == Verdict(False, "", "no choice letter")


def test_multiple_choice_needs_a_letter_as_solution() -> None:
    with pytest.raises(ValueError, match="must be one letter of ABCD"):
        MultipleChoiceGrader().grade(asked("The photon"), ["A"])
    with pytest.raises(ValueError, match="letters is 'abcd'"):
        MultipleChoiceGrader("abcd")


def test_disagreements_with_math_verify_are_those_of_the_docs() -> None:
    from math_verify import parse, verify

    disagreeing = [
        f"| {label} | `{solution}` | `{answer}` |"
        for label, pairs in (("right", RIGHT), ("wrong", WRONG))
        for solution, answer in pairs
        if "9^9" not in answer and verify(parse(solution), parse(answer)) != (label == "right")
    ]
    page = (Path(__file__).parents[2] / "docs" / "grading.md").read_text(encoding="utf-8")
    listed = [line for line in page.splitlines() if line.startswith(("| right |", "| wrong |"))]
    assert listed == disagreeing
