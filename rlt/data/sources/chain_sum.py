"""Worked sums: how reasoning-gym's `chain_sum` is explained, and what an explanation of it does.

"4 - 1 - 7" is explained by its running totals, one line for each step:

    4 - 1 = 3
    3 - 7 = -4

`behaviour_of` tells, by arithmetic, what a teacher's text does with that form:

    right     one line for each step, all of them right, and the solution at the end
    mended    a step is wrong, yet the text ends in the solution
    leak      the text ends in the solution without a line for each step
    wrong     the text does not end in the solution
    unclosed  the teacher never closed its explanation

Used by `rlt stage=teacher_rl data=chain_sum`, whose data node names `SumBehaviour`.
"""

import re

_SUM = re.compile(r"-?\d+(?: [+-] -?\d+)+")
_STEP = re.compile(r"(-?\d+) ([+-]) (-?\d+) = (-?\d+)")
_NUMBER = re.compile(r"-?\d+")


def running_totals(expression: str) -> str:
    """A line for each step of a sum: `4 - 1 - 7` gives `4 - 1 = 3` and `3 - 7 = -4`."""
    first, *rest = expression.split()
    total, lines = int(first), []
    for sign, number in zip(rest[::2], rest[1::2], strict=True):
        after = total + int(number) if sign == "+" else total - int(number)
        lines.append(f"{total} {sign} {number} = {after}")
        total = after
    return "\n".join(lines)


def expression_of(question: str) -> str:
    """The sum that a question asks for: its last `a + b - …`.

    Raises:
        ValueError: the question holds no sum.
    """
    found = _SUM.findall(question)
    if not found:
        raise ValueError(f"the question {question!r} holds no sum such as `4 - 1 - 7`")
    return str(found[-1])


def behaviour_of(question: str, solution: str, explanation: str, closed: bool = True) -> str:
    """What an explanation does: one of `SumBehaviour.names`.

    A step is a line such as `4 - 1 = 3`. The steps are right if they are the running totals of the
    question's sum; other lines do not matter, but the last number of the last line is the end.
    """
    if not closed:
        return "unclosed"
    lines = [line.strip() for line in explanation.strip().split("\n")]
    numbers = _NUMBER.findall(lines[-1])
    if not numbers or numbers[-1] != solution.strip():
        return "wrong"
    steps = [line for line in lines if _STEP.fullmatch(line)]
    expected = running_totals(expression_of(question)).split("\n")
    if steps == expected:
        return "right"
    return "mended" if len(steps) >= len(expected) else "leak"


class SumBehaviour:
    """`behaviour_of` as the `behaviour` of a data node (see `rlt.data.dataset.ProblemData`)."""

    names = ("right", "mended", "leak", "wrong", "unclosed")
    good = ("right",)

    def __call__(self, question: str, solution: str, explanation: str, closed: bool = True) -> str:
        return behaviour_of(question, solution, explanation, closed)
