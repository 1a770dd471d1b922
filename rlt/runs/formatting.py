"""Numbers as text for people."""

import math


def number(value: float) -> str:
    """Return a number with four significant digits; whole numbers with all their digits."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def signed(value: float) -> str:
    """Return `number(value)` with its sign, `+` included."""
    return ("+" if value >= 0 else "") + number(value)


def percent(share: float) -> str:
    """Return a share from 0 to 1 in percent, with one decimal."""
    return f"{100 * share:.1f} %"


def points(difference: float) -> str:
    """Return a signed difference of two shares in percentage points, with one decimal."""
    return f"{100 * difference:+.1f}"


def duration(seconds: float) -> str:
    """Return seconds as people say them: `4.2 s`, `3 min 07 s` or `1 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
