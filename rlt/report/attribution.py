"""Reward attribution for people: every token with its value, coloured where possible.

Markdown gets a code block of `"token" value` pairs, which `rlt.report.html` colours. TensorBoard
gets a picture.

A token of an explanation has the teacher's log-prob minus the student's as its value. Its colour is
warm where the student would hardly have written the token. A token of a solution has the student's
log-prob as its value. Its colour is red where the student is still in doubt after the explanation.
The token that set the maximum or minimum of a reward term has a frame.
"""

import html
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from rlt.rewards.attribution import extremes

FENCE = "attribution"
_TITLES = {
    "explanation": "explanation (teacher's less student's log-prob)",
    "solution": "solution (student's log-prob)",
    "advantage": "advantage (what RL moved each token by: blue up, orange down)",
}
_FULL_COLOUR = 4.0  # nats
_PAIR = re.compile(r'("(?:[^"\\]|\\.)*") ([+-]\d+\.\d+)')
_COLUMNS = 140  # characters in a line of the picture
_MAX_LINES = 40

Tokens = Sequence[tuple[str, float]]


def attribution_fence(found: Mapping[str, Tokens]) -> str:
    """Return a code block that `coloured` can read back. No token can end the block early."""
    lines = []
    for name, title in _TITLES.items():
        if found.get(name):
            pairs = (f"{_quoted(token)} {value:+.2f}" for token, value in found[name])
            lines += [f"{title}:", " ".join(pairs)]
    body = "\n".join(lines)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", body)), default=0))
    return f"{fence}{FENCE}\n{body}\n{fence}" if lines else ""


def _quoted(token: str) -> str:
    return json.dumps(token, ensure_ascii=False)


def coloured(block: str) -> str:
    """Return a block as HTML with coloured tokens; pointing at a token shows its value."""
    lines = block.split("\n")  # splitlines would also split at separators inside a token
    parts = []
    for title, line in zip(lines[::2], lines[1::2], strict=False):
        tokens = [(json.loads(token), float(value)) for token, value in _PAIR.findall(line)]
        name = title.partition(" ")[0]
        framed = extremes({"explanation": [], "solution": [], name: tokens}).get(name)
        spans = (
            f'<span style="background:{_css(colour(name, value))}"'
            f'{" class=framed" if place == framed else ""} title="{value:+.2f}">'
            f"{html.escape(token).replace(chr(10), '⏎<br>')}</span>"
            for place, (token, value) in enumerate(tokens)
        )
        parts.append(f"<p class=tokens><small>{html.escape(title)}</small><br>{''.join(spans)}</p>")
    return "\n".join(parts)


def colour(name: str, value: float) -> tuple[float, float, float, float]:
    """Return red, green, blue and opacity from 0 to 1; opacity grows with the absolute value."""
    strength = min(1.0, abs(value) / _FULL_COLOUR)
    if name == "advantage":
        value = -value
    if name == "solution":
        return (0.85, 0.15, 0.15, strength)
    return (0.90, 0.45, 0.05, strength) if value > 0 else (0.15, 0.45, 0.80, strength)


def _css(rgba: tuple[float, float, float, float]) -> str:
    red, green, blue = (round(255 * part) for part in rgba[:3])
    return f"rgba({red},{green},{blue},{rgba[3]:.2f})"


def attribution_figure(row: Mapping[str, Any]) -> Figure:
    """Draw the attribution of a sample as a picture for TensorBoard; long texts are cut."""
    lines: list[tuple[str, list[tuple[int, str, float, bool]]]] = []
    found = row["attribution"]
    framed = extremes(found)
    for name in _TITLES:
        line: list[tuple[int, str, float, bool]] = []
        column = 0
        for place, (token, value) in enumerate(found.get(name, ())):
            shown = token.replace("\n", "⏎") or " "
            shown = "".join(char if char.isprintable() else "·" for char in shown)
            if column + len(shown) > _COLUMNS and line:
                lines.append((name, line))
                line, column = [], 0
            line.append((column, shown, value, framed.get(name) == place))
            column += len(shown) + (0 if token != token.strip() else 1)
        lines.append((name, line))
    lines = lines[:_MAX_LINES]
    figure = Figure(figsize=(10, 0.6 + 0.26 * len(lines)))
    ax = figure.add_axes((0.01, 0.0, 0.98, 0.92))
    ax.set_axis_off()
    ax.set_xlim(0, _COLUMNS)
    ax.set_ylim(len(lines), 0)
    figure.text(0.01, 0.94, f"reward {float(row['reward']):+.3f}", fontsize=9)
    for y, (name, line) in enumerate(lines):
        for column, shown, value, is_framed in line:
            box = {
                "facecolor": colour(name, value), "pad": 1.0,
                "edgecolor": "black" if is_framed else "none",
            }  # fmt: skip
            text = shown.replace("$", r"\$")
            ax.text(column, y + 0.6, text, family="monospace", fontsize=8, bbox=box)
    return figure
