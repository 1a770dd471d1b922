"""Explanations of reasoning-gym's `chain_sum`: how they are written and classified.

The sum "4 - 1 - 7" is explained by its running totals, one line for each step:

    4 - 1 = 3
    3 - 7 = -4

`behaviour_of` classifies the explanation of a teacher by its arithmetic:

    right     there is one line for each step, all of them are right, and the solution is last
    mended    a step is wrong, but the text ends with the solution
    leak      the text ends with the solution, but there is not a line for each step
    wrong     the text does not end with the solution
    unclosed  the teacher did not end its explanation with the end tag

The config group `data=chain_sum` uses `SumBehaviour`: `rlt stage=teacher_rl data=chain_sum`.
"""

import re

_SUM = re.compile(r"-?\d+(?: [+-] -?\d+)+")
_STEP = re.compile(r"(-?\d+) ([+-]) (-?\d+) = (-?\d+)")
_NUMBER = re.compile(r"-?\d+")


def running_totals(expression: str) -> str:
    """Return a line for each step of a sum: `4 - 1 = 3` and `3 - 7 = -4` for `4 - 1 - 7`."""
    first, *rest = expression.split()
    total, lines = int(first), []
    for sign, number in zip(rest[::2], rest[1::2], strict=True):
        after = total + int(number) if sign == "+" else total - int(number)
        lines.append(f"{total} {sign} {number} = {after}")
        total = after
    return "\n".join(lines)


def expression_of(question: str) -> str:
    """Return the sum that a question asks for: the last `a + b - …` in it.

    Raises:
        ValueError: the question contains no sum.
    """
    sums = _SUM.findall(question)
    if not sums:
        raise ValueError(f"the question {question!r} contains no sum such as `4 - 1 - 7`")
    return str(sums[-1])


def behaviour_of(question: str, solution: str, explanation: str, closed: bool = True) -> str:
    """Return the behaviour of an explanation, one of `SumBehaviour.names`.

    A step is a line such as `4 - 1 = 3`. The steps are right if they are the running totals of the
    question's sum. Other lines are ignored, except that the text ends with the last number of the
    last line.

    Args:
        question: the question, which contains a sum.
        solution: the result of the sum.
        explanation: the explanation.
        closed: whether the teacher has ended its explanation with the end tag.

    Raises:
        ValueError: the question contains no sum.
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
        """Return the behaviour of an explanation (see `behaviour_of`)."""
        return behaviour_of(question, solution, explanation, closed)
