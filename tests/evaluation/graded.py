"""Problems to be graded, and text that takes a verifier long."""

from typing import Any

from rlt.data.problem import Problem, make_problem

TOWER = "9^{9^{9^{9^9}}}"  # one multiplication that no signal interrupts


def asked(solution: str, **metadata: Any) -> Problem:
    return make_problem("a question", solution, metadata=metadata)


COUNTDOWN = asked(
    "7*8 - 6",
    task="countdown",
    entry={"question": "?", "answer": "7*8 - 6", "metadata": {"numbers": [6, 7, 8], "target": 50}},
)
