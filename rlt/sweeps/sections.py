"""The sections of a study's page on rewards, behaviours, RL, examples, failures and costs.

Each function returns Markdown, or an empty text if the runs have nothing to show.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlt.evaluation.statistics import rank_correlation, t_interval
from rlt.report.plots import (
    plot_named_curves,
    plot_points,
)
from rlt.report.text import heading, image_links, inline_code, reward_terms, sample_text, table
from rlt.runs.formatting import duration, number, percent
from rlt.sweeps.arms import Arm, Cell
from rlt.sweeps.jobs import Job
from rlt.sweeps.study import failures

_FEWEST_TRACES = 4  # sets of traces with different rewards that a rank correlation needs


def failures_section(jobs: Sequence[Job]) -> str:
    """Return a table of the jobs that did not finish, with the reasons; empty if all did."""
    found = failures(jobs)
    if not found:
        return ""
    counted = f"{len(found)} of {len(jobs)} jobs."
    return f"{counted}\n\n{table(['job', 'why'], [[inline_code(n), heading(w)] for n, w in found])}"


def reward_predicts_section(folder: Path, arms: Sequence[Arm]) -> str:
    """Return the rank correlation between rewards of traces and accuracies of their students.

    It is empty if the arms have different rewards, or too few sets of traces.
    """
    rewards = {
        str(cell.job.run.config.get("reward")) for arm in arms for cell in arm.cells.values()
    }
    taught: dict[int, dict[Path, tuple[float, list[float]]]] = {}
    for arm in arms:
        for seed, cell in arm.cells.items():
            traces = cell.last("collect")
            if traces is not None and "collect/reward" in traces.metrics:
                # One file of traces may teach several students.
                students = taught.setdefault(seed, {})
                reward = traces.metrics["collect/reward"]
                known = students.setdefault(traces.run.folder.resolve(), (reward, []))
                known[1].append(float(cell.shares_P.mean()))
    found = {
        seed: [(reward, float(np.mean(shares))) for reward, shares in students.values()]
        for seed, students in taught.items()
    }
    n = min((len({reward for reward, _ in pairs}) for pairs in found.values()), default=0)
    if len(rewards) > 1 or n < _FEWEST_TRACES:
        return ""
    correlations = [rank_correlation(*np.array(pairs).T) for pairs in found.values()]
    lines = [
        f"Spearman's rank correlation between the mean reward of traces and the accuracy of the "
        f"student they taught, over {n} sets of traces: "
    ]
    if len(correlations) > 1 and np.isfinite(correlations).all():
        interval = t_interval(correlations)
        lines[0] += (
            f"**{interval.mean:.2f}** [{interval.low:.2f}, {min(1.0, interval.high):.2f}], mean "
            f"and 95 % interval over {len(correlations)} seeds. The paper reports about 0.89."
        )
    else:
        lines[0] += ", ".join(f"{value:.2f}" for value in correlations) + "."
    plot = plot_points(
        {f"seed {seed}": pairs for seed, pairs in sorted(found.items())},
        "mean reward of the traces", "accuracy of the student", folder / "plots" / "reward.png",
    )  # fmt: skip
    return "\n\n".join([*lines, image_links([plot], folder)])


def behaviours_section(arms: Sequence[Arm]) -> str:
    """Return a table of how often each behaviour occurs in each arm's traces.

    Behaviours below 0.5 % in every arm are left out.
    """
    shares = {
        arm.name: mean_by_key(
            [behaviour_rates_of(m, "collect/") for m in metrics_of(arm, "collect")]
        )
        for arm in arms
    }
    shares = {name: row for name, row in shares.items() if row}
    if not shares:
        return ""
    names = [
        n for n in next(iter(shares.values())) if any(row[n] >= 0.005 for row in shares.values())
    ]
    rows = [[heading(arm), *(percent(row[n]) for n in names)] for arm, row in shares.items()]
    return f"Share of each behaviour, mean over seeds.\n\n{table(['traces of', *names], rows)}"


def rewards_by_behaviour_section(arms: Sequence[Arm]) -> str:
    """Return the mean reward terms of each behaviour in the arm with the most mixed traces."""
    mixed, name, mixed_traces = 0.0, "", list[dict[str, Any]]()
    for arm in arms:
        traces = [
            row for c in arm.cells.values() if (s := c.last("collect")) for row in s.run.traces
        ]
        counts = Counter(str(row["behaviour"]) for row in traces if "behaviour" in row)
        if counts and (diversity := 1 - max(counts.values()) / len(traces)) > mixed:
            mixed, name, mixed_traces = diversity, arm.name, traces
    by_behaviour: dict[str, list[dict[str, float]]] = {}
    for row in mixed_traces:
        terms = {"reward": float(row["reward"]), **reward_terms(row)}
        by_behaviour.setdefault(str(row["behaviour"]), []).append(terms)
    if not by_behaviour:
        return ""
    columns = list(next(iter(by_behaviour.values()))[0])
    ordered = sorted(by_behaviour.items(), key=lambda item: -len(item[1]))
    body = [
        [behaviour, f"{len(rows):,}", *(number(mean_by_key(rows)[c]) for c in columns)]
        for behaviour, rows in ordered
        if len(rows) >= 5
    ]
    return (
        f"Means over the traces of {heading(name)}, terms unweighted.\n\n"
        f"{table(['behaviour', 'traces', *columns], body)}"
    )


def rl_curves_section(folder: Path, arms: Sequence[Arm]) -> str:
    """Draw rewards and behaviours during RL, a panel for the first seed of each arm."""
    rewards: dict[str, dict[str, list[tuple[int, float]]]] = {}
    behaviours: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for arm in arms:
        step = arm.first.last("student_rl") or arm.first.last("teacher_rl")
        if step is None:
            continue
        scalars = step.run.scalars
        found = {
            name: scalars[f"{name}/reward"]
            for name in ("train", "validation")
            if len(scalars.get(f"{name}/reward", ())) > 1
        }
        if found:
            rewards[arm.name] = found
        curves = {
            name.removeprefix("train/behaviour/").removesuffix("_rate"): values
            for name, values in scalars.items()
            if name.startswith("train/behaviour/") and max(v for _, v in values) >= 0.02
        }
        if curves:
            behaviours[arm.name] = curves
    parts = []
    for what, name, of_arms in (
        ("Its own reward at each step", "rewards", rewards),
        ("Share of each behaviour at each step", "behaviours", behaviours),
    ):
        if of_arms:
            file = folder / "plots" / f"{name}.png"
            plot = plot_named_curves(of_arms, file, shares=name == "behaviours")
            parts.append(f"{what}, first seed.\n\n{image_links([plot], folder)}")
    return "\n\n".join(parts)


def examples_section(arms: Sequence[Arm]) -> str:
    """Return the trace of median reward of each arm's first seed."""
    parts = []
    for arm in arms:
        step = arm.first.last("collect")
        if step is None or not step.run.traces:
            continue
        rows = sorted(step.run.traces, key=lambda row: float(row["reward"]))
        middle: dict[str, Any] = rows[len(rows) // 2]
        parts.append(
            f"### {heading(arm.name)}\n\nThe middle one by reward.\n\n{sample_text(middle)}"
        )
    return "\n\n".join(parts)


def costs_section(arms: Sequence[Arm]) -> str:
    """Return a table of each arm's time by stage; a reused step counts with its original time."""
    totals = [mean_by_key([_seconds_by_stage(cell) for cell in arm.cells.values()]) for arm in arms]
    stages = list(dict.fromkeys(stage for row in totals for stage in row))
    rows = [
        [
            heading(arm.name),
            *(duration(row[stage]) if stage in row else "" for stage in stages),
            duration(sum(row.values())),
        ]
        for arm, row in zip(arms, totals, strict=True)
    ]
    return (
        "Mean over seeds. Steps that arms have in common were made once and count for each.\n\n"
        f"{table(['arm', *stages, 'all'], rows)}"
    )


def _seconds_by_stage(cell: Cell) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for step in cell.steps:
        spent = float(step.run.manifest.get("seconds") or 0.0)
        seconds[step.stage] = seconds.get(step.stage, 0.0) + spent
    return seconds


def behaviour_rates_of(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    """Return behaviour → share from the metrics `<prefix>behaviour/<name>_rate`."""
    start = f"{prefix}behaviour/"
    return {
        name.removeprefix(start).removesuffix("_rate"): value
        for name, value in metrics.items()
        if name.startswith(start)
    }


def mean_by_key(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each key over the rows that have it."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            values.setdefault(key, []).append(value)
    return {key: float(np.mean(v)) for key, v in values.items()}


def metrics_of(arm: Arm, stage: str) -> list[dict[str, Any]]:
    """Return the final metrics of the last step of a stage, for each cell that has one."""
    steps = [cell.last(stage) for cell in arm.cells.values()]
    return [step.metrics for step in steps if step is not None]
