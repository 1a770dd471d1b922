"""Bars, dots and lines as PNG, drawn without a display and without matplotlib's global state."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

TRAIN, VALIDATION, OTHER, GREY = "#2f6690", "#d1602b", "#5f9e6e", "#8a8f98"
COLORS = (TRAIN, VALIDATION, OTHER, GREY, "#b79f3b", "#7d5ba6", "#22262b")
_DPI = 110
_FEW = 8  # points of a curve that are marked one by one
_SHOWN_LABEL = 40  # characters


def plot_histograms(
    columns: Mapping[str, Sequence[float]], file: Path, what: str = "traces"
) -> Path | None:
    """Draw a histogram of each column with its mean; None if no column has two values."""
    columns = {title: values for title, values in columns.items() if len(values) > 1}
    if not columns:
        return None
    figure, axes = grid(len(columns), x_label="")
    for ax, (title, values) in zip(axes, columns.items(), strict=True):
        ax.hist(values, bins=_bins(np.asarray(values)), color=TRAIN, alpha=0.85)
        ax.axvline(float(np.mean(values)), color=VALIDATION, lw=1.6, label="mean")
        ax.set_title(plain(title), fontsize=10)
        ax.set_ylabel(what, fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", fontsize=8, frameon=False)
    return save(figure, file)


def _bins(values: np.ndarray) -> Any:
    """Return at most 40 bins of equal width; bins of whole numbers cover equally many each."""
    if np.any(values != np.round(values)):
        return min(40, max(10, len(values) // 20))
    low, high = float(values.min()), float(values.max())
    width = int((high - low) // 40) + 1
    return np.arange(low - 0.5, high + width + 0.5, width)


def plot_bars(
    rows: Sequence[tuple[str, float, float, float]], title: str, file: Path,
    marked: str | None = None,
) -> Path:  # fmt: skip
    """Draw horizontal bars of (label, share, low, high) and highlight one of them.

    Args:
        marked: the label of the highlighted bar; None means the last one.
    """
    figure = Figure(figsize=(7.5, 1.3 + 0.42 * len(rows)), layout="constrained")
    ax = figure.add_subplot()
    places = np.arange(len(rows))[::-1]
    shares, lows, highs = (np.array([row[i] for row in rows]) for i in (1, 2, 3))
    errors = np.maximum(0, [shares - lows, highs - shares])
    marked = rows[-1][0] if marked is None else marked
    colors = [TRAIN if row[0] == marked else GREY for row in rows]
    ax.barh(places, shares, color=colors, height=0.62)
    ax.errorbar(
        shares, places, xerr=errors, fmt="none", ecolor="#22262b", elinewidth=1.3, capsize=3
    )
    end = float(highs.max())
    for place, share, high in zip(places, shares, highs, strict=True):
        ax.text(high + 0.015 * end, place, f"{100 * share:.1f} %", va="center", fontsize=9)
    ax.set_yticks(places, [plain(_short(row[0])) for row in rows], fontsize=9)
    ax.set_xlim(0, 1.12 * end if end > 0 else 1)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    ax.set_title(plain(title), fontsize=10)
    _tidy(ax, "x")
    return save(figure, file)


def plot_intervals(rows: Sequence[tuple[str, float, float, float]], title: str, file: Path) -> Path:
    """Draw a dot for each (label, mean, low, high), and its interval unless that is NaN."""
    figure = Figure(figsize=(7.5, 1.1 + 0.36 * len(rows)), layout="constrained")
    ax = figure.add_subplot()
    places = np.arange(len(rows))[::-1]
    means, lows, highs = (np.array([row[i] for row in rows]) for i in (1, 2, 3))
    ax.hlines(places, lows, highs, color=GREY, linewidth=2.2)
    ax.plot(means, places, "o", color=TRAIN, markersize=7)
    ax.set_yticks(places, [plain(_short(row[0])) for row in rows], fontsize=9)
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.margins(x=0.06)
    ax.set_title(plain(f"{title}, mean and 95 % interval"), fontsize=10)
    _tidy(ax, "both")
    return save(figure, file)


def plot_intervals_along(
    lines: Mapping[str, Sequence[tuple[float, float, float, float]]], x_label: str, y_label: str,
    file: Path, shares: bool,
) -> Path:  # fmt: skip
    """Draw each line's dots (x, mean, low, high) with their intervals, joined in order of x."""
    figure, (ax,) = grid(1, x_label=x_label)
    xs = np.unique([x for points in lines.values() for x, *_ in points])
    _scale(ax, xs)
    for color, (name, points) in zip(itertools.cycle(COLORS), lines.items(), strict=False):
        x, means, lows, highs = np.array(sorted(points), dtype=float).T
        ax.plot(x, means, "o-", color=color, ms=5, lw=1.3, label=plain(_short(name)))
        ax.vlines(x, lows, highs, color=color, linewidth=1.6, alpha=0.6)
    ax.set_ylabel(plain(y_label), fontsize=9)
    if shares:
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    if len(lines) > 1:
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return save(figure, file)


def _scale(ax: Axes, xs: np.ndarray) -> None:
    """Make the x axis logarithmic if the values span more than a factor of ten.

    If there are only a few values, each of them gets a tick.
    """
    sizes = np.abs(xs[xs != 0])
    if sizes.max() > 10 * sizes.min():
        if xs.min() > 0:
            ax.set_xscale("log")
        else:
            ax.set_xscale("symlog", linthresh=sizes.min())
    if len(xs) <= _FEW:
        ax.set_xticks(xs, [f"{x:g}" for x in xs])
        ax.xaxis.set_minor_locator(NullLocator())


def plot_points(
    series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str, file: Path
) -> Path:
    """Draw the points (x, share) of each series, joined in the order of x."""
    figure, (ax,) = grid(1, x_label=x_label)
    for color, (name, pairs) in zip(itertools.cycle(COLORS), series.items(), strict=False):
        ax.plot(*zip(*sorted(pairs), strict=True), "o-", ms=4, lw=1.0, color=color, label=name)
    ax.set_ylabel(y_label, fontsize=9)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return save(figure, file)


def plot_named_curves(
    panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], file: Path, shares: bool
) -> Path:
    """Draw a panel of named curves over steps for each entry; a name has one colour in all."""
    figure, axes = grid(len(panels))
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    colors = dict(zip(names, itertools.cycle(COLORS), strict=False))
    handles: dict[str, Any] = {}
    for ax, (title, curves) in zip(axes, panels.items(), strict=True):
        ax.set_title(plain(_short(title)), fontsize=10)
        for name, values in curves.items():
            steps, heights = np.array(values, dtype=float).T
            marker = "o" if len(values) < _FEW else None
            (handles[name],) = ax.plot(
                steps, heights, color=colors[name], lw=1.5, marker=marker, ms=4
            )
        if shares:
            ax.set_ylim(0, 1)
            ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper right", ncols=len(handles), fontsize=8,
        frameon=False,
    )  # fmt: skip
    return save(figure, file)


def grid(n: int, x_label: str = "step") -> tuple[Figure, list[Axes]]:
    """Return a figure with `n` empty axes of one style, at most three in a row.

    Args:
        x_label: stands below the lowest axes; empty for axes that do not count steps.
    """
    columns = 1 if n == 1 else 2 if n in (2, 4) else 3
    rows = -(-n // columns)
    size = (7.5, 3.4) if n == 1 else (4.0 * columns, 2.5 * rows + 0.5)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    axes = [figure.add_subplot(rows, columns, place + 1) for place in range(n)]
    for place, ax in enumerate(axes):
        _tidy(ax, "both")
        ax.ticklabel_format(axis="y", scilimits=(-3, 5), useOffset=False)
        if x_label:
            ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        if place >= n - columns:
            ax.set_xlabel(x_label, fontsize=9)
    return figure, axes


def _tidy(ax: Axes, grid: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)
    ax.grid(axis=grid, color="#e4e6ea", linewidth=0.8)
    ax.set_axisbelow(True)


def save(figure: Figure, file: Path) -> Path:
    """Write the figure as a PNG, make its folder if need be, and return `file`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=_DPI)
    return file


def _short(label: str) -> str:
    return label if len(label) <= _SHOWN_LABEL else label[: _SHOWN_LABEL - 1] + "…"


def plain(label: str) -> str:
    """Return the label with `$` escaped, so that matplotlib does not read it as a formula."""
    return label.replace("$", r"\$")
