"""Which tokens made a reward, and what RL made of it.

That is the log-ratio along an explanation, the log-probs of a solution, and the advantages that RL
gave to the explanation's tokens.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from rlt.data.problem import Problem
from rlt.data.renderer import Renderer
from rlt.rewards.terms import TokenScores

Attribution = dict[str, list[tuple[str, float]]]
_DIGITS = 4
_CONTEXT = 8  # tokens before one that decide how it is written


def attribution(
    renderer: Renderer,
    problem: Problem,
    ids: Sequence[int],
    scores: TokenScores,
    advantages_T: Tensor | None = None,
) -> Attribution:
    """(token, value) lists in nats, rounded for the page.

    `solution`: student's log-prob of each solution token; the lowest sets r_SS's minimum.
    `explanation`: teacher's less student's log-prob of each token, the highest sets r_KL's maximum;
    without a teacher the student's surprise alone.
    `advantage`: of each explanation token in RL; given where tokens have advantages of their own.
    """
    text = renderer.student_text(problem, ids)
    solution_ids = text.continuation[slice(*text.solution_span)]
    ratios_T = -scores.student_log_probs_T
    if scores.teacher_log_probs_T is not None:
        ratios_T = ratios_T + scores.teacher_log_probs_T
    found = {
        "explanation": _tokens(renderer, ids, ratios_T.tolist()),
        "solution": _tokens(renderer, solution_ids, scores.solution_log_probs_K.tolist()),
    }
    if advantages_T is not None and bool((advantages_T != advantages_T[0]).any()):
        values = advantages_T[: len(ids)].tolist()
        found["advantage"] = _tokens(renderer, ids, values)
    return found


def extremes(found: Mapping[str, Sequence[tuple[str, float]]]) -> dict[str, int]:
    """Place of the token that set r_KL's maximum and of the one that set r_SS's minimum."""
    places = {}
    for name, pick in (("explanation", max), ("solution", min)):
        values = [value for _, value in found[name]]
        if values:
            places[name] = values.index(pick(values))
    return places


def _tokens(
    renderer: Renderer, ids: Sequence[int], values: Sequence[float]
) -> list[tuple[str, float]]:
    # What each token adds to the text: alone, a word's token would lack the space before it.
    found = []
    for n, value in enumerate(values):
        start = max(0, n - _CONTEXT)
        before = renderer.decode(ids[start:n])
        found.append((renderer.decode(ids[start : n + 1])[len(before) :], round(value, _DIGITS)))
    return found
