"""Curves and bars as PNG, drawn without a display and without matplotlib's global state."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from rlt.report.events import Scalars

TRAIN, VALIDATION, OTHER, GREY = "#2f6690", "#d1602b", "#5f9e6e", "#8a8f98"
_COLORS = (TRAIN, VALIDATION, OTHER, GREY, "#b79f3b", "#7d5ba6", "#22262b")
_DPI = 110
_FEW = 8  # points of a curve that are marked one by one
_SHOWN_LABEL = 40  # characters

Panel = tuple[str, tuple[str, ...]]  # title, names of the scalars in it

# One PNG per family. Panels without values are left out, families without panels too.
FAMILIES: dict[str, tuple[Panel, ...]] = {
    "reward": (
        ("reward", ("train/reward", "validation/reward")),
        ("reward std within a group", ("train/reward_std", "validation/reward_std")),
    ),
    "loss": (
        ("loss (nats per target token)", ("train/loss", "validation/loss")),
        ("held-out answer accuracy", ("validation/answer_accuracy",)),
    ),
    "policy": (
        ("KL to the reference (k3, nats)", ("policy/kl_reference_k3",)),
        ("KL to the sampling policy (k3, nats)", ("policy/kl_old_k3",)),
        ("entropy (nats per token)", ("policy/entropy", "train/entropy")),
        ("clipped tokens (share)", ("policy/clip_low_share", "policy/clip_high_share")),
        ("gradient norm before clipping", ("policy/grad_norm", "train/grad_norm")),
        ("groups without advantage (share)", ("policy/zero_advantage_share",)),
        ("policy loss", ("policy/loss",)),
        ("learning rate", ("policy/lr", "train/lr")),
    ),
    "completions": (
        ("tokens per completion", ("train/completion_tokens", "validation/completion_tokens")),
        ("explanations closed (share)", ("train/end_tag_share", "validation/end_tag_share")),
        ("cut by length (share)", ("train/overlong_share", "validation/overlong_share")),
    ),
}
_LEFT_OUT_IF_ZERO = ("policy/kl_old", "policy/clip_", "policy/zero_")


def plot_curves(scalars: Scalars, folder: Path) -> list[Path]:
    """Draw every family that has curves of two points or more."""
    terms = sorted({n.split("/reward_terms/")[1] for n in scalars if "/reward_terms/" in n})
    families = dict(FAMILIES) | {
        "reward_terms": tuple(
            (term, (f"train/reward_terms/{term}", f"validation/reward_terms/{term}"))
            for term in terms
        ),
        "monitors": tuple((n, (n,)) for n in sorted(scalars) if n.startswith("monitor/")),
    }
    drawn = []
    for name in ("reward", "reward_terms", "loss", "completions", "monitors", "policy"):
        panels = [
            (title, kept)
            for title, names in families[name]
            if (kept := [n for n in names if _worth_drawing(n, scalars.get(n, []))])
        ]
        if panels:
            drawn.append(_plot_panels(panels, scalars, folder / f"{name}.png"))
    behaviours = {
        prefix: {
            name.removeprefix(f"{prefix}/behaviour/").removesuffix("_share"): values
            for name, values in scalars.items()
            if name.startswith(f"{prefix}/behaviour/") and _worth_drawing(name, values)
        }
        for prefix in ("train", "validation")
    }
    behaviours = {prefix: curves for prefix, curves in behaviours.items() if curves}
    if behaviours:
        drawn.append(plot_named_curves(behaviours, folder / "behaviours.png", shares=True))
    seconds = {
        n: v for n, v in scalars.items() if n.startswith("time/train_") and n.endswith("_seconds")
    }
    if seconds and len(set.intersection(*map(_steps, seconds.values()))) > 1:
        drawn.append(_plot_time(seconds, folder / "time.png"))
    return drawn


def _steps(values: Sequence[tuple[int, float]]) -> set[int]:
    return {step for step, _ in values}


def _worth_drawing(name: str, values: Sequence[tuple[int, float]]) -> bool:
    if len(values) < 2:
        return False
    return not name.startswith(_LEFT_OUT_IF_ZERO) or any(abs(v) > 1e-9 for _, v in values)


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over `window` values (an odd number) around each; fewer at the ends."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    places = np.arange(len(values))
    starts = np.maximum(0, places - window // 2)
    ends = np.minimum(len(values), places + window // 2 + 1)
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts))


def _window(n: int) -> int:
    return max(5, n // 20 | 1)


def _plot_panels(panels: Sequence[tuple[str, list[str]]], scalars: Scalars, file: Path) -> Path:
    figure, axes = _grid(len(panels))
    handles: dict[str, Any] = {}
    for ax, (title, names) in zip(axes, panels, strict=True):
        ax.set_title(_plain(title), fontsize=10)
        clipped = [n for n in names if "/clip_" in n]
        for name in names:
            steps, values = np.array(scalars[name], dtype=float).T
            if name.startswith("validation/"):
                (handles["validation"],) = ax.plot(
                    steps, values, "o-", color=VALIDATION, markersize=4, linewidth=1.4, zorder=3
                )
                continue
            color = OTHER if name.endswith("clip_high_share") else TRAIN
            window = _window(len(values))
            smooth = len(values) >= 2 * window
            (thin,) = ax.plot(
                steps, values, color=color, linewidth=0.8 if smooth else 1.4,
                alpha=0.35 if smooth else 1.0,
            )  # fmt: skip
            handles.setdefault("each step", thin)
            if smooth:
                (thick,) = ax.plot(steps, moving_average(values, window), color=color, lw=1.8)
                handles.setdefault(f"mean over {window} steps", thick)
            if clipped:
                label = "upper bound" if name.endswith("high_share") else "lower bound"
                ax.plot([], [], color=color, label=label)
        if clipped:
            ax.legend(fontsize=8, frameon=False)
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper right", ncols=3, fontsize=8,
        frameon=False,
    )  # fmt: skip
    return _save(figure, file)


def _plot_time(seconds: Scalars, file: Path) -> Path:
    """Seconds per step, phase upon phase."""
    figure, (ax,) = _grid(1)
    common = sorted(set.intersection(*map(_steps, seconds.values())))
    names = sorted(seconds, key=lambda n: -float(np.mean([v for _, v in seconds[n]])))
    columns = [dict(seconds[name]) for name in names]
    stacked = [moving_average(np.array([c[s] for s in common]), 3) for c in columns]
    labels = [n.removeprefix("time/train_").removesuffix("_seconds") for n in names]
    ax.stackplot(common, *stacked, labels=labels, colors=_COLORS, alpha=0.85)
    ax.set_title("seconds per training step, by phase (mean over 3 steps)", fontsize=10)
    ax.set_ylim(bottom=0)
    ax.margins(x=0)
    figure.legend(loc="outside right upper", fontsize=9, frameon=False, reverse=True)
    return _save(figure, file)


def plot_histograms(
    columns: Mapping[str, Sequence[float]], file: Path, what: str = "traces"
) -> Path | None:
    """One histogram per column, with its mean."""
    columns = {title: values for title, values in columns.items() if len(values) > 1}
    if not columns:
        return None
    figure, axes = _grid(len(columns), x_label="")
    for ax, (title, values) in zip(axes, columns.items(), strict=True):
        ax.hist(values, bins=_bins(np.asarray(values)), color=TRAIN, alpha=0.85)
        ax.axvline(float(np.mean(values)), color=VALIDATION, lw=1.6, label="mean")
        ax.set_title(_plain(title), fontsize=10)
        ax.set_ylabel(what, fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", fontsize=8, frameon=False)
    return _save(figure, file)


def _bins(values: np.ndarray) -> Any:
    """At most 40 bins of equal width; for whole numbers, each bin holds equally many of them."""
    if np.any(values != np.round(values)):
        return min(40, max(10, len(values) // 20))
    low, high = float(values.min()), float(values.max())
    width = int((high - low) // 40) + 1
    return np.arange(low - 0.5, high + width + 0.5, width)


def plot_bars(
    rows: Sequence[tuple[str, float, float, float]], title: str, file: Path,
    marked: str | None = None,
) -> Path:  # fmt: skip
    """Horizontal bars of (label, share, low, high); one is marked by its label, else the last."""
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
    ax.set_yticks(places, [_plain(_short(row[0])) for row in rows], fontsize=9)
    ax.set_xlim(0, 1.12 * end if end > 0 else 1)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    ax.set_title(_plain(title), fontsize=10)
    _tidy(ax, "x")
    return _save(figure, file)


def plot_intervals(rows: Sequence[tuple[str, float, float, float]], title: str, file: Path) -> Path:
    """A dot for each (label, mean, low, high), with its interval where there is one (not NaN)."""
    figure = Figure(figsize=(7.5, 1.1 + 0.36 * len(rows)), layout="constrained")
    ax = figure.add_subplot()
    places = np.arange(len(rows))[::-1]
    means, lows, highs = (np.array([row[i] for row in rows]) for i in (1, 2, 3))
    ax.hlines(places, lows, highs, color=GREY, linewidth=2.2)
    ax.plot(means, places, "o", color=TRAIN, markersize=7)
    ax.set_yticks(places, [_plain(_short(row[0])) for row in rows], fontsize=9)
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.margins(x=0.06)
    ax.set_title(_plain(f"{title}, mean and 95 % interval"), fontsize=10)
    _tidy(ax, "both")
    return _save(figure, file)


def plot_intervals_along(
    lines: Mapping[str, Sequence[tuple[float, float, float, float]]], x_label: str, y_label: str,
    file: Path, shares: bool,
) -> Path:  # fmt: skip
    """Dots (x, mean, low, high) of each line, joined in the order of x."""
    figure, (ax,) = _grid(1, x_label=x_label)
    xs = np.unique([x for points in lines.values() for x, *_ in points])
    _scale(ax, xs)
    for color, (name, points) in zip(itertools.cycle(_COLORS), lines.items(), strict=False):
        x, means, lows, highs = np.array(sorted(points), dtype=float).T
        ax.plot(x, means, "o-", color=color, ms=5, lw=1.3, label=_plain(_short(name)))
        ax.vlines(x, lows, highs, color=color, linewidth=1.6, alpha=0.6)
    ax.set_ylabel(_plain(y_label), fontsize=9)
    if shares:
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    if len(lines) > 1:
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return _save(figure, file)


def _scale(ax: Axes, xs: np.ndarray) -> None:
    """A logarithmic axis for values of more than a decade; a few values are its ticks."""
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
    """Points (x, share) of each series, joined in the order of x."""
    figure, (ax,) = _grid(1, x_label=x_label)
    for color, (name, pairs) in zip(itertools.cycle(_COLORS), series.items(), strict=False):
        ax.plot(*zip(*sorted(pairs), strict=True), "o-", ms=4, lw=1.0, color=color, label=name)
    ax.set_ylabel(y_label, fontsize=9)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return _save(figure, file)


def plot_named_curves(
    panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], file: Path, shares: bool
) -> Path:
    """A panel per entry: named curves along the steps, the same colours in each."""
    figure, axes = _grid(len(panels))
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    colors = dict(zip(names, itertools.cycle(_COLORS), strict=False))
    handles: dict[str, Any] = {}
    for ax, (title, curves) in zip(axes, panels.items(), strict=True):
        ax.set_title(_plain(_short(title)), fontsize=10)
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
    return _save(figure, file)


def _grid(n: int, x_label: str = "step") -> tuple[Figure, list[Axes]]:
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


def _save(figure: Figure, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=_DPI)
    return file


def _short(label: str) -> str:
    return label if len(label) <= _SHOWN_LABEL else label[: _SHOWN_LABEL - 1] + "…"


def _plain(label: str) -> str:
    """A label that is not taken for a formula."""
    return label.replace("$", r"\$")
