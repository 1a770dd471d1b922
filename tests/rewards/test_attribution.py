"""Attribution: which token made a reward, in Markdown, in colour, as a picture."""

import html
import re

import pytest
import torch

from rlt.data.problem import make_problem
from rlt.data.renderer import Renderer
from rlt.report.attribution import attribution_fence, attribution_figure, colour, coloured
from rlt.rewards import TokenScores
from rlt.rewards.attribution import attribution, extremes

FOUND = {
    "explanation": [("so ", 0.25), ("``` <b>&\n", 2.5), ("a\u2028b", 0.0), ('"q\\" ', -1.0)],
    "solution": [("7", -3.0), ("</s>", -0.5)],
}


def test_values_by_hand(renderer: Renderer) -> None:
    problem = make_problem("?", "12")
    ids = renderer.encode("ab")
    text = renderer.student_text(problem, ids)
    K = text.solution_span[1] - text.solution_span[0]
    log_probs = -torch.arange(1.0, K + 1)
    scores = TokenScores(log_probs, torch.tensor([-2.0, -0.5]), torch.tensor([-1.0, -1.5]), True)
    found = attribution(renderer, problem, ids, scores)
    assert found["explanation"] == [("a", 1.0), ("b", -1.0)]
    assert [value for _, value in found["solution"]] == log_probs.tolist()
    assert "".join(token for token, _ in found["solution"]).strip() == "12"
    assert extremes(found) == {"explanation": 0, "solution": K - 1}
    alone = TokenScores(log_probs, torch.tensor([-2.0, -0.5]), None, True)
    assert attribution(renderer, problem, ids, alone)["explanation"] == [("a", 2.0), ("b", 0.5)]


def test_the_block_survives_any_token_and_is_read_back_in_colour() -> None:
    block = attribution_fence(FOUND)
    fence = re.match("`+", block)
    assert fence and len(fence[0]) == 4 and block.endswith("\n````")
    page = coloured("\n".join(block.split("\n")[1:-1]))
    spans = re.findall(r'<span style="([^"]*)"( class=framed)? title="([^"]*)">(.*?)</span>', page)
    shown = [(html.unescape(text).replace("⏎<br>", "\n"), float(v)) for _, _, v, text in spans]
    assert shown == [*FOUND["explanation"], *FOUND["solution"]]
    assert [bool(framed) for _, framed, _, _ in spans] == [False, True, False, False, True, False]
    assert "<b>" not in page and "rgba(217,38,38,0.75)" in page
    assert attribution_fence({"explanation": [], "solution": []}) == ""


@pytest.mark.parametrize(
    ("name", "value", "opacity"),
    [("explanation", 2.0, 0.5), ("explanation", -9.0, 1.0), ("solution", -1.0, 0.25)],
)
def test_colours(name: str, value: float, opacity: float) -> None:
    assert colour(name, value)[3] == opacity
    assert colour("explanation", 1.0)[:3] != colour("explanation", -1.0)[:3]


def test_the_picture_breaks_lines_and_frames_the_extremes() -> None:
    long = {"explanation": [("word", 0.1)] * 100 + [("$x", 3.0)], "solution": [("7", -1.0)]}
    figure = attribution_figure({"attribution": long, "reward": -1.5})
    texts = figure.axes[0].texts
    assert len(texts) == 102
    assert len({round(text.get_position()[1], 2) for text in texts}) == 4 + 1
    framed = [t.get_text() for t in texts if t.get_bbox_patch().get_edgecolor()[3] == 1.0]
    assert framed == [r"\$x", "7"]
    assert figure.texts[0].get_text() == "reward -1.500"
