"""Replies of the grading worker that are none: an answer got hold of the pipe."""

import pytest

from rlt.data.problem import make_problem
from rlt.evaluation.graders import ReasoningGymGrader

COUNTDOWN = make_problem(
    "a question",
    "7*8 - 6",
    metadata={
        "task": "countdown",
        "entry": {
            "question": "?",
            "answer": "7*8 - 6",
            "metadata": {"numbers": [6, 7, 8], "target": 50},
        },
    },
)
WRITING = """eval('_'+'_imp'+'ort_'+'_("os").write({file}, bytes.fromhex("{text}"))')"""


@pytest.mark.parametrize("text", [b"no JSON\n", b"[1]\n", b'{"result": {"score": "full"}}\n'])
def test_an_answer_that_writes_replies_is_an_error_and_the_next_is_graded(text: bytes) -> None:
    attacks = [WRITING.format(file=file, text=text.hex()) for file in range(3, 6)]
    with ReasoningGymGrader(timeout_seconds=20) as grader:
        verdicts = grader.grade(COUNTDOWN, [*attacks, "7*8-6"])
    assert verdicts[-1].correct
    assert not any(verdict.correct for verdict in verdicts[:-1])
    assert any("is no reply" in verdict.reason for verdict in verdicts[:-1])
