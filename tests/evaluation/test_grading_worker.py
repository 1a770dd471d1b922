"""The verifier's process: limits of time and memory, its start, its end."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rlt.evaluation.graders import (
    MathGrader,
    ReasoningGymGrader,
    Verdict,
)
from rlt.evaluation.sandbox import Sandbox, VerifierError
from tests.evaluation.graded import COUNTDOWN, TOWER, asked


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
