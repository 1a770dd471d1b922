"""The curves of a run, drawn from its TensorBoard scalars: one PNG per family."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlt.report.events import Scalars
from rlt.report.plots import COLORS, OTHER, TRAIN, VALIDATION, grid, plain, plot_named_curves, save

Panel = tuple[str, tuple[str, ...]]  # its title and the names of its scalars

# Each family is one PNG. Panels without values and families without panels are left out.
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
        ("clipped tokens (share)", ("policy/clip_low_rate", "policy/clip_high_rate")),
        ("gradient norm before clipping", ("policy/grad_norm", "train/grad_norm")),
        ("groups without advantage (share)", ("policy/zero_advantage_rate",)),
        ("policy loss", ("policy/loss",)),
        ("learning rate", ("policy/lr", "train/lr")),
    ),
    "completions": (
        ("tokens per completion", ("train/completion_tokens", "validation/completion_tokens")),
        ("explanations closed (share)", ("train/end_tag_rate", "validation/end_tag_rate")),
        ("cut by length (share)", ("train/overlong_rate", "validation/overlong_rate")),
    ),
}
_LEFT_OUT_IF_ZERO = ("policy/kl_old", "policy/clip_", "policy/zero_")


def plot_curves(scalars: Scalars, folder: Path) -> list[Path]:
    """Draw every family with a curve of at least two points; return the PNG files."""
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
            name.removeprefix(f"{prefix}/behaviour/").removesuffix("_rate"): values
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
    """Return the mean of `window` values (an odd number) around each value; fewer at the ends."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    places = np.arange(len(values))
    starts = np.maximum(0, places - window // 2)
    ends = np.minimum(len(values), places + window // 2 + 1)
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts))


def _window(n: int) -> int:
    return max(5, n // 20 | 1)


def _plot_panels(panels: Sequence[tuple[str, list[str]]], scalars: Scalars, file: Path) -> Path:
    figure, axes = grid(len(panels))
    handles: dict[str, Any] = {}
    for ax, (title, names) in zip(axes, panels, strict=True):
        ax.set_title(plain(title), fontsize=10)
        clipped = [n for n in names if "/clip_" in n]
        for name in names:
            steps, values = np.array(scalars[name], dtype=float).T
            if name.startswith("validation/"):
                (handles["validation"],) = ax.plot(
                    steps, values, "o-", color=VALIDATION, markersize=4, linewidth=1.4, zorder=3
                )
                continue
            color = OTHER if name.endswith("clip_high_rate") else TRAIN
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
                label = "upper bound" if name.endswith("high_rate") else "lower bound"
                ax.plot([], [], color=color, label=label)
        if clipped:
            ax.legend(fontsize=8, frameon=False)
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper right", ncols=3, fontsize=8,
        frameon=False,
    )  # fmt: skip
    return save(figure, file)


def _plot_time(seconds: Scalars, file: Path) -> Path:
    """Draw the seconds of each training step, with its phases stacked."""
    figure, (ax,) = grid(1)
    common = sorted(set.intersection(*map(_steps, seconds.values())))
    names = sorted(seconds, key=lambda n: -float(np.mean([v for _, v in seconds[n]])))
    columns = [dict(seconds[name]) for name in names]
    stacked = [moving_average(np.array([c[s] for s in common]), 3) for c in columns]
    labels = [n.removeprefix("time/train_").removesuffix("_seconds") for n in names]
    ax.stackplot(common, *stacked, labels=labels, colors=COLORS, alpha=0.85)
    ax.set_title("seconds per training step, by phase (mean over 3 steps)", fontsize=10)
    ax.set_ylim(bottom=0)
    ax.margins(x=0)
    figure.legend(loc="outside right upper", fontsize=9, frameon=False, reverse=True)
    return save(figure, file)
