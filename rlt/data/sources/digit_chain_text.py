"""The questions and explanations of digit chains (`rlt.data.sources.digit_chain`).

An explanation shows one of these behaviours, which `behaviour_of` distinguishes exactly:

    step    all running sums are right: "3 8 0 7 1 7 6"
    slip    one running sum is wrong, and the error is carried on
    leak    the solution is stated without its steps: "is 6 is 6"
    vague   five to nine meaningless words
    direct  the explanation is empty

If there is more than one operation, a question begins with the sign of its operation
("- 3 5 2" -> "6"). For subtraction, running differences replace the running sums.

A vague explanation always begins with the same word. If it began with any of the eight words, each
of them would be too rare to be the most likely continuation, and greedy decoding would hide vague
text.
"""

import itertools
import random
from collections.abc import Callable, Sequence

from rlt.llm.digit_words import DIGITS, FILLER, LEAK_WORD, MODULUS, SIGNS, VAGUE_WORDS

VAGUE_LENGTHS = (5, 9)  # smallest and largest number of words


def running_results(digits: Sequence[int], operation: str = "add") -> list[int]:
    """Return the sum (or difference) modulo 10 after each digit. The last one is the solution.

    Args:
        digits: the digits of the chain.
        operation: `add` or `subtract`.
    """
    factor = {"add": 1, "subtract": -1}[operation]
    return [total % MODULUS for total in itertools.accumulate(digits, lambda a, b: a + factor * b)]


def write_question(digits: Sequence[int], width: int, sign: str | None = None) -> str:
    """Return the text of a question.

    Args:
        digits: the digits of the chain.
        width: number of digits and fillers.
        sign: sign of the operation, which is put first; None leaves it out.
    """
    start = [] if sign is None else [sign]
    return " ".join([*start, *map(str, digits), *[FILLER] * (width - len(digits))])


def read_question(question: str) -> tuple[list[int], str]:
    """Return the digits of a question and its operation. Without a sign, the operation is `add`."""
    tokens = [token for token in question.split() if token != FILLER]
    for operation, sign in SIGNS.items():
        if tokens and tokens[0] == sign:
            return [int(token) for token in tokens[1:]], operation
    return [int(token) for token in tokens], "add"


def explain_step(results: Sequence[int], rng: random.Random) -> str:
    """Return all running results. They are the argument of all of these functions."""
    return " ".join(map(str, results))


def explain_slip(results: Sequence[int], rng: random.Random) -> str:
    """Return running results that are wrong by the same amount from a random position on."""
    place, error = rng.randrange(len(results)), rng.randrange(1, MODULUS)
    slipped = [(result + error) % MODULUS for result in results[place:]]
    return " ".join(map(str, [*results[:place], *slipped]))


def explain_leak(results: Sequence[int], rng: random.Random) -> str:
    """Return the solution, stated twice without its steps."""
    return f"{LEAK_WORD} {results[-1]} {LEAK_WORD} {results[-1]}"


def explain_vague(results: Sequence[int], rng: random.Random) -> str:
    """Return five to nine meaningless words."""
    n_words = rng.randint(*VAGUE_LENGTHS)
    return " ".join([VAGUE_WORDS[0], *rng.choices(VAGUE_WORDS, k=n_words - 1)])


def explain_direct(results: Sequence[int], rng: random.Random) -> str:
    """Return an empty explanation."""
    return ""


BEHAVIOURS: dict[str, Callable[[Sequence[int], random.Random], str]] = {
    "step": explain_step,
    "leak": explain_leak,
    "vague": explain_vague,
    "slip": explain_slip,
    "direct": explain_direct,
}


def behaviour_of(question: str, solution: str, explanation: str) -> str:
    """Return the behaviour of an explanation: a name of `BEHAVIOURS`, `wrong_leak` or `other`.

    A leak is wrong unless it states the solution twice. The vague text of a model may have any
    number of words and may begin with any of them.

    Args:
        question: the question, as `write_question` writes it.
        solution: the solution.
        explanation: the explanation.
    """
    tokens = explanation.split()
    if not tokens:
        return "direct"
    if all(token in VAGUE_WORDS for token in tokens):
        return "vague"
    if len(tokens) == 4 and tokens[0] == tokens[2] == LEAK_WORD:
        stated = {tokens[1], tokens[3]}
        if stated == {solution}:
            return "leak"
        return "wrong_leak" if stated <= set(DIGITS) else "other"
    results = running_results(*read_question(question))
    if len(tokens) != len(results) or not set(tokens) <= set(DIGITS):
        return "other"
    errors = [(int(token) - true) % MODULUS for token, true in zip(tokens, results, strict=True)]
    changes = [after for before, after in itertools.pairwise([0, *errors]) if after != before]
    if not changes:
        return "step"
    return "slip" if len(changes) == 1 else "other"


class ChainBehaviour:
    """`behaviour_of` as the `behaviour` of a data node (see `rlt.data.dataset.ProblemData`)."""

    names = (*BEHAVIOURS, "wrong_leak", "other")
    good = ("step",)

    def __call__(self, question: str, solution: str, explanation: str, closed: bool = True) -> str:
        """Return the behaviour of an explanation (see `behaviour_of`). `closed` is ignored."""
        return behaviour_of(question, solution, explanation)
