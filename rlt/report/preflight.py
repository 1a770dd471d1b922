"""The reward preflight in a report: areas under the ROC curve as a table and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlt.report.plots import plot_intervals
from rlt.report.text import table

TITLE = "Does the reward tell good explanations from bad?"
_EXPLAINED = (
    "Area under the ROC curve, with its 95 % interval over problems: the chance that a good "
    "explanation gets the higher value than a bad one. 0.5 is chance, 1 tells all of them apart."
)


def preflight_section(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table with a row for each kind of bad explanations and a column for each term.

    Args:
        rows: the rows of preflight.json.
    """
    if not rows:
        return ""
    terms = list(dict.fromkeys(str(row["term"]) for row in rows))
    shown = {(row["against"], row["term"]): row for row in rows}
    lines = []
    for against in dict.fromkeys(row["against"] for row in rows):
        found = [shown[against, term] for term in terms]
        cells = [f"{row['area']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" for row in found]
        lines.append([f"`{against}`", f"{found[0]['good']} : {found[0]['bad']}", *cells])
    header = ["against", "good : bad", *(f"`{term}`" for term in terms)]
    return f"{_EXPLAINED}\n\n{table(header, lines)}"


def plot_preflight(rows: Sequence[Mapping[str, Any]], file: Path) -> Path | None:
    """Draw every area as a dot with its interval; None if there are no areas."""
    if not rows:
        return None
    dots = [
        (f"{row['against']} by {row['term']}", row["area"], row["low"], row["high"]) for row in rows
    ]
    return plot_intervals(dots, "area under the ROC curve: good against bad explanations", file)
