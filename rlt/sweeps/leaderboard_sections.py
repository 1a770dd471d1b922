"""The sections of a study's page that rank its arms and compare them with the reference."""

import re
from pathlib import Path

import numpy as np

from rlt.report.plots import plot_bars, plot_intervals, plot_intervals_along
from rlt.report.results import accuracy_k
from rlt.report.text import (
    as_number,
    heading,
    image_links,
    inline_code,
    metric_difference,
    metric_interval,
    metric_unit,
    metric_value,
    table,
)
from rlt.sweeps.jobs import short_names
from rlt.sweeps.study import Study


def leaderboard_section(folder: Path, study: Study) -> str:
    """Return a table and plots of every arm's mean with its interval, the best arm first."""
    name, measure = study.measure.name, study.measure
    rows = []
    for place, arm in enumerate(study.ranked, start=1):
        known = np.isfinite(arm.interval.mean)
        scores = " ".join(_score(name, score) for score in arm.scores.values())
        mean = metric_interval(name, *arm.interval) if arm.scores else "none"
        row = [str(place) if known else "", heading(arm.name), mean, scores, str(len(arm.scores))]
        rows.append(row)
    header = ["rank", "arm", "mean [95 % interval]", "each seed", "seeds"]
    notes, shown = [], [arm for arm in study.ranked if np.isfinite(arm.interval.mean)]
    if measure.metric is None:
        k = accuracy_k(study.arms[0].first.step.metrics)
        header[2] = f"avg@{k} [95 % interval]"
        questions = len(study.arms[0].first.shares_P)
        notes.append(f"{questions:,} questions, {k} sampled answers each.")
        bars = [(a.name, a.interval.mean, *np.clip(a.interval[1:], 0, 1)) for a in shown]
        title = f"avg@{k}, 95 % intervals"
        file = folder / "plots" / "accuracy.png"
        plots = [plot_bars(bars, title, file, marked=study.reference.name)]
    else:
        how = "highest" if measure.sign > 0 else "lowest"
        notes.append(f"Ranked by {inline_code(measure.metric)}, the {how} first.")
        intervals = [(arm.name, *arm.interval) for arm in shown]
        file = folder / "plots" / "leaderboard.png"
        plots = [plot_intervals(intervals, measure.metric, file)] if intervals else []
    plots += _plots_of_swept_numbers(folder, study)
    notes.append(_about_intervals(study))
    if len(shown) < len(study.ranked):
        notes.append("Arms without a finite mean have no rank.")
    return "\n\n".join([table(header, rows), image_links(plots, folder), " ".join(notes)])


def _score(name: str, score: float) -> str:
    if metric_unit(name) == "fraction" and np.isfinite(score):
        return f"{100 * score:.1f}"
    return metric_value(name, score).replace(" ", "\N{NO-BREAK SPACE}")


def _about_intervals(study: Study) -> str:
    kinds = {arm.interval_over for arm in study.arms}
    texts = []
    if "seeds" in kinds:
        texts.append(
            "Intervals are Student's over seeds: they hold for training again from another seed."
        )
    if "questions" in kinds:
        which = "Those of a single seed" if "seeds" in kinds else "Intervals"
        texts.append(
            f"{which} are bootstrapped over questions: they hold for these very models, not for "
            "training again from another seed."
        )
    if study.measure.metric is not None and any(len(arm.scores) == 1 for arm in study.arms):
        texts.append("One seed has no interval: nothing tells it from chance.")
    return " ".join(texts)


def _plots_of_swept_numbers(folder: Path, study: Study) -> list[Path]:
    """Draw the measure against each swept key whose values are numbers.

    Arms that agree in all other swept keys are joined by a line.
    """
    arms = [arm for arm in study.arms if np.isfinite(arm.interval.mean)]
    keys = list(dict.fromkeys(key for arm in arms for key in arm.overrides))
    short = short_names(keys, ".", fewest=2)
    plots = []
    for key in keys:
        numbers = [as_number(arm.overrides[key]) for arm in arms]
        if None in numbers or len(set(numbers)) < 2:
            continue
        lines: dict[str, list[tuple[float, float, float, float]]] = {}
        for arm, x in zip(arms, numbers, strict=True):
            others = [f"{short[k]}={v}" for k, v in arm.overrides.items() if k != key]
            if x is not None:
                lines.setdefault(", ".join(others), []).append((x, *arm.interval))
        file = folder / "plots" / f"by_{re.sub(r'[^A-Za-z0-9_.-]+', '_', key)}.png"
        share = metric_unit(study.measure.name) == "fraction"
        name = study.measure.metric or "accuracy"
        plots.append(plot_intervals_along(lines, key, name, file, shares=share))
    return plots


def differences_section(study: Study) -> str:
    """Return a table of the reference minus every other arm, with intervals and verdicts.

    It is empty where no arm can be compared with the reference.
    """
    name = study.measure.name
    rows = [
        [
            heading(d.other.name),
            *(metric_difference(name, value) for value in d.interval),
            f"{d.wins} of {d.seeds}",
            d.verdict,
        ]
        for d in study.differences.values()
        if d is not None
    ]
    if not rows:
        return ""
    rows = [[arm, mean, f"[{low}, {high}]", *rest] for arm, mean, low, high, *rest in rows]
    what = "points" if metric_unit(name) == "fraction" else "difference"
    against = f"{heading(study.reference.name)} against"
    header = [against, what, "95 % interval", "ahead in", "is"]
    paired = "Paired by seed and question." if study.measure.metric is None else "Paired by seed."
    return f"{paired}\n\n{table(header, rows)}"
