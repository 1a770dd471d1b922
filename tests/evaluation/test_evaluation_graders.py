"""Graders on hand-labelled answers: right, wrong, tricky and hostile."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlt.data.problem import Problem, make_problem
from rlt.evaluation.graders import (
    ExactGrader,
    MathGrader,
    MultipleChoiceGrader,
    ReasoningGymGrader,
    Verdict,
)
from rlt.evaluation.sandbox import Sandbox, VerifierError, VerifierTimeoutError
from tests.evaluation.labelled_answers import RIGHT, WRONG

TOWER = "9^{9^{9^{9^9}}}"  # one multiplication that no signal interrupts


def asked(solution: str, **metadata: Any) -> Problem:
    return make_problem("a question", solution, metadata=metadata)


@pytest.fixture(scope="module")
def maths() -> Iterator[MathGrader]:
    with MathGrader(timeout_seconds=10) as grader:
        yield grader


@pytest.fixture(scope="module")
def gym() -> Iterator[ReasoningGymGrader]:
    with ReasoningGymGrader(timeout_seconds=10) as grader:
        yield grader


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


def test_an_error_in_the_verifier_is_named(maths: MathGrader) -> None:
    [verdict] = maths.grade(asked("5"), ["1" * 6000])  # beyond Python's digits of an int
    assert not verdict.correct
    assert verdict.reason.startswith("error: ")
    assert verdict.failed


def test_a_hanging_answer_times_out_and_the_next_is_graded() -> None:
    with MathGrader(timeout_seconds=1) as grader:
        begin = time.monotonic()
        hanging, after = grader.grade(asked("1/2"), [TOWER, "0.5"])
        assert time.monotonic() - begin < 30
    assert (hanging.correct, hanging.reason, hanging.failed) == (False, "timeout", True)
    assert (after.correct, after.reason) == (True, "correct")


def test_grading_off_the_main_thread_times_out_too() -> None:
    verdicts: list[Verdict] = []
    with MathGrader(timeout_seconds=1) as grader:
        thread = threading.Thread(target=lambda: verdicts.extend(grader.grade(asked("5"), [TOWER])))
        thread.start()
        thread.join(30)
    assert [verdict.reason for verdict in verdicts] == ["timeout"]


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


COUNTDOWN = asked(
    "7*8 - 6",
    task="countdown",
    entry={"question": "?", "answer": "7*8 - 6", "metadata": {"numbers": [6, 7, 8], "target": 50}},
)


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


@pytest.mark.parametrize(
    "attack",
    [
        "open('{target}', 'w')",
        "__import__('os').system('touch {target}')",
        "eval('_'+'_imp'+'ort_'+'_(\"os\")').system('touch {target}')",
        "eval('_'+'_imp'+'ort_'+'_(\"os\")').mkdir('{target}')",
    ],
)
def test_an_answer_cannot_write_files(gym: ReasoningGymGrader, tmp_path: Path, attack: str) -> None:
    target = tmp_path / "written"
    [verdict] = gym.grade(COUNTDOWN, [attack.replace("{target}", str(target))])
    assert not verdict.correct
    assert not target.exists()


def test_a_hanging_expression_times_out_and_the_next_is_graded() -> None:
    with ReasoningGymGrader(timeout_seconds=1) as grader:
        verdicts = grader.grade(COUNTDOWN, ["9**9**9**9", "7*8-6"])
    assert [verdict.reason for verdict in verdicts] == ["timeout", "correct"]


def test_a_memory_bomb_is_stopped_and_the_next_is_graded() -> None:
    with ReasoningGymGrader(timeout_seconds=20, memory_mb=256) as grader:
        begin = time.monotonic()
        verdicts = grader.grade(COUNTDOWN, ["len('0'.zfill(10**11)) + 7*8-6", "7*8-6"])
        assert time.monotonic() - begin < 15  # refused at once, not filled until the time is up
    assert [verdict.correct for verdict in verdicts] == [False, True]


def test_too_little_memory_is_an_error_of_the_verifier() -> None:
    with MathGrader(timeout_seconds=60, memory_mb=16) as grader:
        verdicts = grader.grade(asked("1/3"), ["0." + "3" * 4_000_000, "2/6"])
    assert [verdict.reason for verdict in verdicts] == ["error: MemoryError: ", "correct"]


def started(grader: MathGrader) -> int | None:
    return grader.sandbox.pid


def test_starting_is_lazy_and_closing_leaves_no_process() -> None:
    grader = MathGrader()
    assert grader.grade(asked("42"), ["42"])[0].correct  # equal strings need no worker
    assert started(grader) is None
    assert grader.grade(asked("42"), ["84/2"])[0].correct
    pid = started(grader)
    assert pid is not None
    grader.close()
    assert started(grader) is None
    with pytest.raises(ProcessLookupError):  # gone and reaped: no zombie either
        os.kill(pid, 0)
    assert grader.grade(asked("42"), ["84/2"])[0].correct  # closed is not spent
    grader.close()
    grader.close()


def test_a_forgotten_grader_takes_its_worker_along() -> None:
    grader = MathGrader()
    grader.grade(asked("42"), ["84/2"])
    pid = grader.sandbox.pid
    assert pid is not None
    del grader
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_worker_that_dies_is_an_error_and_is_replaced() -> None:
    sandbox = Sandbox("maths")
    assert sandbox.call(solution="5", answer="10/2")["score"] == 1.0
    assert sandbox.pid is not None
    os.kill(sandbox.pid, 9)
    with pytest.raises(VerifierError, match=r"the worker died \(exit code -9\)"):
        sandbox.call(solution="5", answer="10/2")
    assert sandbox.call(solution="5", answer="10/2")["score"] == 1.0
    sandbox.close()


def test_the_worker_ends_when_its_parent_is_killed() -> None:
    program = (
        "from rlt.evaluation.sandbox import Sandbox\n"
        "import os\n"
        "sandbox = Sandbox('maths')\n"
        "sandbox.call(solution='5', answer='10/2')\n"
        "print(sandbox.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, cwd=root, check=False
    )
    pid = int(done.stdout)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and _runs(pid):
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    """Whether the process executes (a zombie waiting for an init that never reaps does not)."""
    status = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(status.stdout.strip()) and not status.stdout.startswith("Z")


def test_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="timeout_seconds is 0"):
        MathGrader(timeout_seconds=0)
    with pytest.raises(ValueError, match="memory_mb is 1,"):
        MathGrader(memory_mb=1)


def test_the_parent_imports_no_verifier() -> None:
    program = (
        "import sys, rlt.evaluation.graders as g\n"
        "g.MathGrader(); g.ReasoningGymGrader()\n"
        "print([m for m in ('torch', 'sympy', 'math_verify', 'reasoning_gym') if m in sys.modules])"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "[]", done.stderr


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
