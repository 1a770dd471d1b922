"""The verifiers that compare one answer with one solution, by math-verify or by reasoning-gym.

They run in the process of `rlt.evaluation.worker`, since they may hang or fill the memory. Their
libraries are imported when they are called, so that the parent can import this module and stays
free of them.
"""

import re
from collections.abc import Callable
from functools import cache
from typing import Any, TypedDict

_DUNDER = re.compile(r"__[a-z]+__")
_WORD = re.compile(r"[A-Za-z]{2,}")
_MATHS_WORDS = re.compile("and|sqrt|sin|cos|tan|cot|sec|csc|log|exp|infty|cup|cap|mod")
_SHORT_WORDS = re.compile("is|it|so|we|he|in|of|to|at|as|an|by|be|if|my|up|us|do|no")


class Verification(TypedDict):
    """What a verifier finds.

    Attributes:
        score: 1 for a right answer, less for a wrong one or for partial credit.
        extracted: the part of the answer that was compared.
        reason: why no comparison was made. It is empty where there was one.
    """

    score: float
    extracted: str
    reason: str


def is_bare_expression(text: str) -> bool:
    r"""Whether the text is one expression rather than prose.

    `\frac{1}{2}` and `x = 3 or x = 5` are bare expressions.
    """
    if re.search(r"\\\(|\\\[|\\boxed|(?<!\\)\$|\n", text):
        return False
    without_commands = re.sub(
        r"\\(?:text|textbf|mathrm|mbox|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+", " ", text
    )
    words = [word.lower() for word in _WORD.findall(without_commands)]
    return not any(
        _SHORT_WORDS.fullmatch(word) or (len(word) > 2 and not _MATHS_WORDS.fullmatch(word))
        for word in words
    )


def verify_maths(solution: str, answer: str) -> Verification:
    """Compare an answer with the solution by math-verify, without math-verify's own alarm.

    A bare expression is read as LaTeX, and prose is searched for expressions.

    Raises:
        ValueError: math-verify cannot read the solution.
        Exception: math-verify failed, with its own error.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    targets = [LatexExtractionConfig(), ExprExtractionConfig()]

    def read(text: str) -> list[Any]:
        found: list[Any] = parse(text, targets, parsing_timeout=None, raise_on_error=True)
        return found

    gold = read(f"${solution.strip().strip('$')}$")
    if not gold:
        raise ValueError(f"math-verify cannot read the solution {solution!r}")
    readings = (f"${answer}$", answer) if is_bare_expression(answer) else (answer, f"${answer}$")
    target = read(readings[0]) or read(readings[1])
    if not target:
        return {"score": 0.0, "extracted": "", "reason": "unreadable"}
    extracted = next((part for part in target if isinstance(part, str)), "")
    correct = verify(gold, target, timeout_seconds=None)
    if not correct:  # a comparison that failed counts as unequal above, so let it raise its error
        correct = verify(gold, target, timeout_seconds=None, raise_on_error=True)
    return {"score": float(correct), "extracted": extracted, "reason": ""}


@cache
def _score_function(task: str) -> Callable[[str, dict[str, Any]], float]:
    import reasoning_gym

    score: Callable[[str, dict[str, Any]], float] = reasoning_gym.get_score_answer_fn(task)
    return score


def verify_reasoning_gym(task: str, entry: dict[str, Any], answer: str) -> Verification:
    """Score an answer by the verifier of the reasoning-gym task.

    The score lies between 0 and 1, with partial credit. An answer with a name such as `__import__`
    is not passed on.

    Args:
        task: the name of the task.
        entry: question, answer and metadata, as the reasoning-gym source stores them.
        answer: the text to score.

    Raises:
        ValueError: reasoning-gym has no such task.
        Exception: the verifier failed, with its own error.
    """
    if _DUNDER.search(answer):
        return {"score": 0.0, "extracted": answer, "reason": "unsafe answer"}
    from rlt.data.sources.procedural import decode_entry

    score = float(_score_function(task)(answer, decode_entry(entry)))
    return {"score": score, "extracted": answer, "reason": ""}


# name: (a module to import before the memory is capped, the function)
FUNCTIONS: dict[str, tuple[str, Callable[..., Verification]]] = {
    "maths": ("math_verify", verify_maths),
    "reasoning_gym": ("rlt.data.sources.procedural", verify_reasoning_gym),
}
