"""The page of a study: what its arms reached, how sure that is, what their teachers wrote.

Made by `rlt stage=compare`, and at the end of a sweep of pipelines. Every arm is shown, those that
lost and the jobs that failed too.
"""

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlt.report.folder import Run
from rlt.report.html import write_html
from rlt.report.run import REPORT_FILE, provenance
from rlt.report.study import Arm, Difference, compare_arms, failures, read_study
from rlt.report.study_sections import (
    accuracy_section,
    behaviours_section,
    costs_section,
    differences_section,
    examples_section,
    failures_section,
    interval_text,
    reward_predicts_section,
    rewards_by_behaviour_section,
    rl_curves_section,
)
from rlt.report.text import heading, inline_code, points


def write_study_report(run_dir: Path) -> Path:
    """Write report.md, report.html and plots/ of a `stage=compare` run, from its config."""
    run = Run(run_dir)
    config = run.config
    jobs, arms, reference = read_study(
        config["runs"], config.get("reference"), config["evaluations"]
    )
    compared = {a.name: compare_arms(reference, a) for a in arms if a is not reference}
    differences = [difference for difference in compared.values() if difference is not None]
    apart = [name for name, difference in compared.items() if difference is None]
    title = config.get("title") or f"{len(arms)} arms compared"
    made = {k: v for k, v in jobs[0].run.manifest.items() if k not in ("seed", "key", "seconds")}
    again = " ".join(["rlt", *map(str, run.manifest.get("command") or [])])
    parts = [
        f"# {heading(title)}",
        heading(run.note),
        "\n".join(f"- {sentence(reference, difference)}" for difference in differences),
        f"No seed in common with {heading(reference.name)}: {heading(', '.join(apart))}."
        if apart
        else "",
        _section("Accuracy", accuracy_section(run_dir, arms, reference)),
        _section("Differences", differences_section(reference, differences)),
        _section("Jobs that did not finish", failures_section(jobs)),
        _section("Does the reward predict teaching?", reward_predicts_section(run_dir, arms)),
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
    return file


def print_study(run_dir: Path, console: Console | None = None) -> None:
    """Print accuracies and differences of a `stage=compare` run, and where its page is."""
    console = console or Console()
    config = Run(run_dir).config
    jobs, arms, reference = read_study(
        config["runs"], config.get("reference"), config["evaluations"]
    )
    shown = Table(title=escape(str(config.get("title") or "arms")), title_justify="left")
    shown.add_column("arm", overflow="fold", min_width=20)
    for name in ("accuracy\n[95 % interval]", "seeds", "reference minus this\n(points)"):
        shown.add_column(escape(name), justify="right", no_wrap=True)
    for arm in arms:
        difference = None if arm is reference else compare_arms(reference, arm)
        cell = ""
        if difference is not None:
            mean, low, high = map(points, difference.interval)
            cell = f"{mean} [{low}, {high}]\n{difference.verdict}"
        name = f"{arm.name} (reference)" if arm is reference else arm.name
        row = name, interval_text(arm), str(len(arm.cells)), cell
        shown.add_row(*map(escape, row))
    console.print(shown)
    for name, why in failures(jobs):
        console.print(f"not finished: {name}: {why}", markup=False, soft_wrap=True)
    console.print(f"report: {run_dir / REPORT_FILE}", markup=False, soft_wrap=True)
    page = (run_dir / REPORT_FILE).with_suffix(".html")
    console.print(f"page:   {page}", markup=False, soft_wrap=True)


def sentence(reference: Arm, difference: Difference) -> str:
    """`A is better than B: +70.1 points [68.9, 71.3], ahead in 6 of 6 seeds.`"""
    a, b, interval = heading(reference.name), heading(difference.other.name), difference.interval
    numbers = f"{points(interval.mean)} points [{points(interval.low)}, {points(interval.high)}]"
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


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""
