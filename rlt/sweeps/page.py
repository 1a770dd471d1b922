"""The page of a study: scores of its arms, their uncertainty, and examples of their traces.

`rlt stage=compare` writes it, and so does a sweep of pipelines when it ends. The page shows every
arm, including those that lost, and the jobs that failed.
"""

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlt.report.folder import Run
from rlt.report.html import write_html
from rlt.report.run import REPORT_FILE, provenance
from rlt.report.text import heading, inline_code, metric_difference, metric_interval, metric_unit
from rlt.sweeps.arms import Difference
from rlt.sweeps.leaderboard import read_leaderboard, read_unfinished, write_leaderboard
from rlt.sweeps.leaderboard_sections import differences_section, leaderboard_section
from rlt.sweeps.sections import (
    behaviours_section,
    costs_section,
    examples_section,
    failures_section,
    reward_predicts_section,
    rewards_by_behaviour_section,
    rl_curves_section,
)
from rlt.sweeps.study import Study


def write_study_report(run_dir: Path, study: Study) -> Path:
    """Write report.md, report.html, plots/ and the leaderboard of a `stage=compare` run."""
    run, arms = Run(run_dir), study.arms
    title = run.config.get("title") or f"{len(arms)} arms compared"
    first = study.jobs[0].run.manifest
    made = {k: v for k, v in first.items() if k not in ("seed", "key", "seconds")}
    again = " ".join(["rlt", *map(str, run.manifest.get("command") or [])])
    sentences = [sentence(study, d) for d in study.differences.values() if d is not None]
    of_accuracy = study.measure.metric is None
    parts = [
        f"# {heading(str(title))}",
        heading(run.note),
        "\n".join(f"- {text}" for text in sentences),
        _not_compared(study),
        _section("Accuracy" if of_accuracy else "Leaderboard", leaderboard_section(run_dir, study)),
        _section("Differences", differences_section(study)),
        _section("Jobs that did not finish", failures_section(study.jobs)),
        _section(
            "Does the reward predict teaching?",
            reward_predicts_section(run_dir, arms) if of_accuracy else "",
        ),
        _section("What the traces do", behaviours_section(arms)),
        _section("Rewards by behaviour", rewards_by_behaviour_section(arms)),
        _section("What RL did", rl_curves_section(run_dir, arms)),
        _section("A trace of each arm", examples_section(arms)),
        _section("What it cost", costs_section(arms)),
        _section("How it was made", f"{provenance(made)}\n\nThis page: {inline_code(again)}"),
    ]
    file = run_dir / REPORT_FILE
    file.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    write_html(file)
    write_leaderboard(run_dir, study)
    return file


def print_study(run_dir: Path, console: Console | None = None) -> None:
    """Print the leaderboard of a `stage=compare` run, its unfinished jobs, and its page's path."""
    console = console or Console()
    config = Run(run_dir).config
    rows = read_leaderboard(run_dir)
    name = rows[0]["metric"]
    metric, direction = config.get("metric"), config.get("direction")
    ranked_by = f"{metric}, {direction}" if metric else "accuracy"
    title = str(config.get("title") or "arms")
    shown = Table(title=escape(f"{title}\n{ranked_by}"), title_justify="left")
    shown.add_column("#", justify="right", no_wrap=True)
    shown.add_column("arm", overflow="fold", min_width=16)
    compared = any(row["difference"] for row in rows)
    unit = "\n(points)" if metric_unit(name) == "fraction" else ""
    columns = [f"{'mean' if metric else 'accuracy'}\n[95 % interval]", "seeds"]
    columns += [f"reference minus this{unit}"] if compared else []
    for column in columns:
        shown.add_column(escape(column), justify="right", no_wrap=True)
    for row in rows:
        mean, low, high = (float(row[key] or "nan") for key in ("mean", "low", "high"))
        interval = metric_interval(name, mean, low, high).replace(" [", "\n[")
        cells = [interval if row["mean"] else "none", row["n"]]
        label = row["arm"]
        if compared:
            is_reference = row["reference_is"] == "reference"
            label += " (reference)" if is_reference else ""
            cells.append(_difference_text(name, row) if row["difference"] else "")
        shown.add_row(*map(escape, [row["rank"], label, *cells]))
    console.print(shown)
    if any(row["n"] == "1" and not row["interval_over"] for row in rows):
        console.print("One seed has no interval: nothing tells it from chance.", markup=False)
    for row in read_unfinished(run_dir):
        text = f"{row['status']}: {row['job']}"
        text += f": {row['reason']}" if row["reason"] != row["status"] else ""
        console.print(text, markup=False, soft_wrap=True)
    console.print(f"report:      {run_dir / REPORT_FILE}", markup=False, soft_wrap=True)
    page = (run_dir / REPORT_FILE).with_suffix(".html")
    console.print(f"page:        {page}", markup=False, soft_wrap=True)
    console.print(f"TensorBoard: tensorboard --logdir {run_dir}", markup=False, soft_wrap=True)


def _difference_text(name: str, row: dict[str, str]) -> str:
    ends = (row[key] for key in ("difference", "difference_low", "difference_high"))
    mean, low, high = (metric_difference(name, float(end)) for end in ends)
    return f"{mean} {row['reference_is']}\n[{low}, {high}]"


def sentence(study: Study, difference: Difference) -> str:
    """Return one Markdown sentence on the reference against another arm.

    For example, `A is better than B: +70.1 points [68.9, 71.3], ahead in 6 of 6 seeds.`
    """
    a, b, name = heading(study.reference.name), heading(difference.other.name), study.measure.name
    mean, low, high = (metric_difference(name, value) for value in difference.interval)
    points = " points" if metric_unit(name) == "fraction" else ""
    numbers = f"{mean}{points} [{low}, {high}]"
    if difference.seeds > 1:
        numbers += f", ahead in {difference.wins} of {difference.seeds} seeds"
    elif difference.questions_needed is not None and difference.verdict == "within noise":
        numbers += (
            f"; a difference as large would show over about {difference.questions_needed:,} "
            "questions"
        )
    if difference.verdict == "within noise":
        return f"{a} against {b}: within noise, {numbers}."
    return f"{a} is **{difference.verdict}** than {b}: {numbers}."


def _not_compared(study: Study) -> str:
    apart = [name for name, difference in study.differences.items() if difference is None]
    if not apart:
        return ""
    common = "No seed" if study.measure.metric is None else "Fewer than two seeds"
    return f"{common} in common with {heading(study.reference.name)}: {heading(', '.join(apart))}."


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""
