"""Numbers and texts as Markdown that no output of a model can break."""

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from rlt.report.attribution import attribution_fence
from rlt.runs.formatting import duration, number, percent, points, signed

SHOWN_CHARACTERS = 2000  # of one text
_GIB = 2**30
_ACCURACY = re.compile(r"/(avg|pass|majority)@\d+(_low|_high)?$|/accuracy(_low|_high)?$")


def as_number(text: str) -> float | None:
    """Return the finite number that a text spells, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def metric_unit(name: str) -> str:
    """Return the unit of a metric by its name: `fraction`, `seconds`, `bytes`, or empty."""
    if name.endswith("_bytes"):
        return "bytes"
    if name.endswith("_seconds"):
        return "seconds"
    is_fraction = name.endswith(("_rate", "_fraction", "_accuracy")) or _ACCURACY.search(name)
    return "fraction" if is_fraction else ""


def metric_value(name: str, value: float) -> str:
    """Return the value of a metric as text, in the unit of `metric_unit`."""
    unit = metric_unit(name)
    if not math.isfinite(value):
        return str(value)
    if unit == "bytes":
        return f"{value / _GIB:.2f} GiB"
    if unit == "seconds":
        return duration(value)
    return percent(value) if unit == "fraction" else number(value)


def metric_difference(name: str, difference: float) -> str:
    """Return a signed difference of two values of a metric; shares in percentage points."""
    unit = metric_unit(name)
    if unit == "fraction":
        return points(difference)
    if unit == "":
        return signed(difference)
    return ("+" if difference >= 0 else "-") + metric_value(name, abs(difference))


def metric_interval(name: str, mean: float, low: float, high: float) -> str:
    """Return a mean with its interval, as `97.7 % [96.9, 98.5]`; the mean alone if `low` is NaN."""
    shown = metric_value(name, mean)
    if math.isnan(low):
        return shown
    if metric_unit(name) == "fraction":
        return f"{shown} [{max(100 * low, 0):.1f}, {min(100 * high, 100):.1f}]"
    return f"{shown} [{metric_value(name, low)}, {metric_value(name, high)}]"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table. Cells may hold any text; numbers are aligned to the right."""
    lines = [[_cell(c) for c in header], [_alignment(column) for column in zip(*rows, strict=True)]]
    for row in rows:
        assert len(row) == len(header), (header, row)
        lines.append([_cell(c) for c in row])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _alignment(column: Iterable[str]) -> str:
    return "---:" if all(re.match(r"[-+\[]?\d|-?$|nan|-?inf", c) for c in column) else "---"


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(text.split()))


def heading(text: str) -> str:
    """Return the text as one line in which all Markdown and HTML markup is escaped."""
    text = re.sub(r"([\\`*\[\]<>#|])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # within a word, _ is not markup


def inline_code(text: str, limit: int = 200) -> str:
    """Return the text as inline code of at most `limit` characters."""
    text = " ".join(text.split())
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    ticks = "`" * (1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`" if text else "(empty)"


def fenced(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """Return a code block that the text cannot end; a text over `limit` loses its middle."""
    if len(text) > limit:
        half, left_out = limit // 2, len(text) - 2 * (limit // 2)
        text = f"{text[:half]}\n… ({left_out:,} characters left out) …\n{text[-half:]}"
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def named_text(name: str, text: str) -> str:
    """Return a short line beside its name, and any other text as a block below the name."""
    if text and len(text) <= 80 and text == " ".join(text.split()):
        return f"{name}: {inline_code(text)}"
    return f"{name}:\n\n{fenced(text)}"


def reward_terms(row: Mapping[str, object]) -> dict[str, float]:
    """Return the reward terms of a sample or trace, from `reward_terms` or the row itself."""
    nested = row.get("reward_terms")
    terms = nested if isinstance(nested, Mapping) else row
    return {
        str(name): float(value)
        for name, value in terms.items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and (terms is nested or "/" in str(name) or name == "end_tag_penalty")
    }


def sample_text(row: Mapping[str, object]) -> str:
    """Return one explanation with its question, solution and reward terms as Markdown."""
    reward = row.get("reward")
    metadata = [f"reward **{number(float(reward))}**"] if isinstance(reward, int | float) else []
    metadata += [f"{name} {number(value)}" for name, value in reward_terms(row).items()]
    if row.get("finish"):
        metadata.append(f"finish `{row['finish']}`")
    parts = [" · ".join(metadata)]
    for key in ("question", "solution", "explanation", "completion"):
        if row.get(key) is not None:
            parts.append(named_text(key.capitalize(), str(row[key])))
    found = row.get("attribution")
    if isinstance(found, Mapping):
        parts.append(attribution_fence(found))
    return "\n\n".join(part for part in parts if part)


def relative_url(file: Path, base: Path) -> str:
    """Return the percent-encoded URL of `file` relative to the folder `base`."""
    return quote(Path(os.path.relpath(file, base)).as_posix())


def image_links(files: Iterable[Path], base: Path) -> str:
    """Return Markdown images with paths relative to the report's folder `base`."""
    return "\n\n".join(
        f"![{file.stem.replace('_', ' ')}]({relative_url(file, base)})" for file in files
    )
