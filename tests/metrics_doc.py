"""Metric names as docs/metrics.md documents them, for tests of what a stage logs."""

import re
from pathlib import Path

DOC = Path(__file__).parent.parent / "docs/metrics.md"
_LOGGED_BY_LIGHTNING = {"epoch"}


def documented_metrics() -> list[str]:
    """Names in the first column of the tables, placeholders such as `<k>` included."""
    rows = [line for line in DOC.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


def documented(name: str) -> bool:
    """Whether a logged name is defined; of `start/…`, whether the metric it repeats is."""
    name = name.removeprefix("start/")
    return name in _LOGGED_BY_LIGHTNING or any(
        re.fullmatch(_pattern(known), name) for known in documented_metrics()
    )


def _pattern(known: str) -> str:
    parts = re.split(r"(<\w+>)", known)
    return "".join(
        r"\d+" if part == "<k>" else r"[^/]+" if part.startswith("<") else re.escape(part)
        for part in parts
    )
