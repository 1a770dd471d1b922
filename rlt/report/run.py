"""report.md of one stage's run: result, metrics, curves, sample texts and provenance."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rlt.evaluation.benchmark import AnswerRecord
from rlt.report.curves import plot_curves
from rlt.report.folder import Run
from rlt.report.html import write_html
from rlt.report.plots import plot_histograms
from rlt.report.preflight import TITLE as PREFLIGHT_TITLE
from rlt.report.preflight import plot_preflight, preflight_section
from rlt.report.results import result_lines
from rlt.report.text import (
    fenced,
    heading,
    image_links,
    inline_code,
    metric_value,
    named_text,
    reward_terms,
    sample_text,
    table,
)
from rlt.rewards.monitors import outside, range_text
from rlt.runs.formatting import duration, number

REPORT_FILE = "report.md"


def write_report(run_dir: Path) -> Path:
    """Write plots/, report.md and report.html of a finished run from the files in its folder."""
    run = Run(run_dir)
    date = str(run.manifest.get("ended") or (run.manifest.get("began") or [""])[-1])
    title = heading(run.stage) + (f" · {date[:16].replace('T', ' ')}" if date else "")
    plots = draw_plots(run, run_dir / "plots")
    sections = [
        f"# {title}",
        heading(run.note),
        "\n".join(f"- {line}" for line in result_lines(run)),
        _section("What was asked for", asked_for(run)),
        _section(PREFLIGHT_TITLE, preflight_section(run.preflight)),
        _section("Is the reward being hacked?", monitors(run)),
        _section("Curves", image_links(plots, run_dir)),
        _section("Metrics", metrics_table(run.metrics)),
        _section("What it cost", costs(run)),
        _section("Samples", samples_section(run)),
        _section("Data", data_section(run.manifest)),
        _section("How it was made", provenance(run.manifest)),
    ]
    file = run_dir / REPORT_FILE
    file.write_text("\n\n".join(s for s in sections if s) + "\n", encoding="utf-8")
    write_html(file)
    return file


def asked_for(run: Run) -> str:
    """Return the overrides, and a table of the values that they changed, as Markdown."""
    overrides = list(map(str, run.manifest.get("overrides") or []))
    parts = [", ".join(map(inline_code, overrides))] if overrides else []
    changed = run.manifest.get("changed") or {}
    if changed:
        rows = [
            [f"`{key}`", inline_code(str(before)), inline_code(str(after))]
            for key, (before, after) in changed.items()
        ]
        parts.append(table(["key", f"in {run.manifest.get('changed_from')}", "here"], rows))
    return "\n\n".join(parts)


def monitors(run: Run) -> str:
    """Return a table of the last hacking monitors beside their healthy ranges.

    Monitors outside their range come first.
    """
    node = (run.config.get("callbacks") or {}).get("hacking") or {}
    rows: list[tuple[bool, list[str]]] = []
    for name, (low, high) in (node.get("ranges") or {}).items():
        values = run.scalars.get(f"monitor/{name}", [])
        if not values:
            continue
        every = int((run.config.get("module") or {}).get("monitor_every_steps") or 1)
        looks = [value for step, value in values if step % every == 0][-int(node["window"]) :]
        mean = fmean(looks or [values[-1][1]])
        out = outside(mean, low, high)
        start = number(values[0][1])
        verdict = "**outside**" if out else "healthy"
        cells = [f"`monitor/{name}`", start, number(mean), range_text(low, high), verdict]
        rows.append((out, cells))
    if not rows:
        return ""
    rows.sort(key=lambda row: not row[0])
    return table(["monitor", "first", "last", "healthy is", ""], [cells for _, cells in rows])


def costs(run: Run) -> str:
    """Return a table of total time, time of each phase of a step, tokens and memory."""
    metadata = {}
    if "seconds" in run.manifest:
        metadata["time in all"] = duration(float(run.manifest["seconds"]))
    for name, values in sorted(run.scalars.items()):
        if name.startswith("time/train_") and values:
            mean = fmean(value for _, value in values)
            shown = duration(mean) if name.endswith("_seconds") else number(mean)
            what = name.removeprefix("time/train_").removesuffix("_seconds").replace("_", " ")
            metadata[f"{what}, mean of {len(values)} steps"] = shown
    tokens = run.scalars.get("train/target_tokens", [])
    if tokens:
        metadata["tokens with a loss"] = number(sum(value for _, value in tokens))
    if "resources/peak_memory_bytes" in run.metrics:
        name = "resources/peak_memory_bytes"
        metadata["peak memory of the process"] = metric_value(name, run.metrics[name])
    return (
        table(["what", "how much"], [list(fact) for fact in metadata.items()]) if metadata else ""
    )


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def draw_plots(run: Run, folder: Path) -> list[Path]:
    """Draw the plots of a run and return the PNG files, the most informative first."""
    plots = plot_curves(run.scalars, folder)
    areas = plot_preflight(run.preflight, folder / "preflight.png")
    plots += [areas] if areas else []
    if run.scores:
        columns = {"reward of each explanation": [float(row["reward"]) for row in run.scores]}
        for row in run.scores:
            for name, value in reward_terms(row).items():
                columns.setdefault(name, []).append(value)
        histograms = plot_histograms(columns, folder / "scores.png", what="explanations")
        return [plot for plot in (areas, histograms) if plot]
    if run.traces:
        titles = {
            "reward": "reward of the kept traces",
            "teacher_tokens": "tokens the teacher wrote",
            "student_tokens": "tokens the student reads",
        }
        columns = {
            title: [float(row[key]) for row in run.traces if row.get(key) is not None]
            for key, title in titles.items()
        }
        histograms = plot_histograms(columns, folder / "traces.png")
        plots = [histograms, *plots] if histograms else plots
    return plots


def metrics_table(metrics: Mapping[str, float]) -> str:
    """Return the final metrics as a Markdown table; empty if there are none."""
    header, rows = metric_rows(metrics)
    return table(header, [[f"`{row[0]}`", *row[1:]] for row in rows]) if rows else ""


def metric_rows(metrics: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of final metrics, with values before training where recorded."""
    names = [name for name in sorted(metrics) if not name.startswith("start/")]
    only_before = [n for n in sorted(metrics) if n.startswith("start/") and n[6:] not in metrics]

    def shown(name: str, key: str) -> str:
        return metric_value(name, metrics[key]) if key in metrics else ""

    if not any(f"start/{name}" in metrics for name in names):
        return ["metric", "value"], [[n, shown(n, n)] for n in names + only_before]
    rows = [[name, shown(name, f"start/{name}"), shown(name, name)] for name in names]
    rows += [[name[6:], shown(name, name), ""] for name in only_before]
    return ["metric", "before", "after"], rows


def samples_section(run: Run, each: int = 2, level: str = "###") -> str:
    """Return sample texts: the best and worst by reward, or some right and wrong answers.

    Args:
        each: texts of each kind.
        level: Markdown prefix of the headings.
    """
    if run.scores:
        shown = best_and_worst_of(run.scores, int(run.config.get("attributed") or 0))
        return "\n\n".join(
            f"{level} Number {row['rank']} of {len(run.scores):,} by reward\n\n{sample_text(row)}"
            for row in shown
        )
    if run.answers:
        return answers_section(run.answers, each, level)
    if run.samples:
        steps = sorted({int(row["step"]) for row in run.samples})
        parts = []
        for which, step in {"First": steps[0], "Last": steps[-1]}.items():
            rows = [row for row in run.samples if int(row["step"]) == step]
            parts.append(best_and_worst(rows, 1, f"{which} step ({step}): ", level))
            if len(steps) == 1:
                break
        return "\n\n".join(parts)
    return best_and_worst(run.traces, each, "", level)


def best_and_worst_of(rows: Sequence[Any], n: int) -> list[Any]:
    """Return the first and last of ordered rows, at most `n` in total."""
    first = min((n + 1) // 2, len(rows))
    return [*rows[:first], *rows[max(first, len(rows) - n // 2) :]]


def best_and_worst(rows: Sequence[Mapping[str, Any]], each: int, prefix: str, level: str) -> str:
    """Return the `each` best and worst rows by reward and the middle one, or all if few."""
    ordered = sorted(
        (row for row in rows if row.get("reward") is not None), key=lambda row: -row["reward"]
    )
    half = min(each, (len(ordered) + 1) // 2)
    chosen = [("best", row) for row in ordered[:half]]
    if len(ordered) > 2 * each:
        chosen.append(("the middle one", ordered[len(ordered) // 2]))
    chosen += [("worst", row) for row in ordered[half:][-each:]]
    return "\n\n".join(
        f"{level} {(prefix + which + ' by reward').capitalize()}\n\n{sample_text(row)}"
        for which, row in chosen
    )


def answers_section(answers: Sequence[AnswerRecord], each: int, level: str) -> str:
    """Return at most `each` right and `each` wrong answers, one of each kind per question."""
    parts = []
    for correct, name in ((True, "Right"), (False, "Wrong")):
        found = [answer for answer in answers if answer.correct is correct]
        of_question = {answer.problem_id: answer for answer in reversed(found)}
        for answer in list(reversed(of_question.values()))[:each]:
            why = f" Grader: {heading(answer.reason)}." if answer.reason else ""
            taken = "nothing" if answer.extracted is None else inline_code(answer.extracted)
            parts.append(
                f"{level} {name}\n\nTaken as its answer: {taken}.{why}\n\n"
                f"{named_text('Question', answer.question)}\n\n"
                f"{named_text('Solution', answer.solution)}\n\n"
                f"{named_text('Completion', answer.text)}"
            )
    return "\n\n".join(parts)


def data_section(manifest: Mapping[str, Any]) -> str:
    """Return how many rows of the data and the traces were read, kept, rejected and split."""
    parts = []
    for key in ("data", "traces"):
        report = manifest.get(key)
        if not isinstance(report, Mapping):
            continue
        counts = [
            [name.replace("_", " "), f"{value:,}"]
            for name, value in report.items()
            if isinstance(value, int) and not isinstance(value, bool)
        ]
        bad = report.get("bad")
        if isinstance(bad, Mapping):
            counts += [[f"bad: {heading(reason)}", f"{count:,}"] for reason, count in bad.items()]
        lines = [f"{key.capitalize()} from {heading(str(report.get('source', 'unknown')))}"]
        if counts:
            lines.append(table(["rows", "count"], counts))
        if report.get("bad_rows"):
            lines.append("First bad rows:\n\n" + fenced("\n".join(map(str, report["bad_rows"]))))
        parts.append("\n\n".join(lines))
    return "\n\n".join(parts)


def provenance(manifest: Mapping[str, Any]) -> str:
    """Return the command, and a table of its time, versions and machine."""
    if not manifest:
        return ""
    hardware = manifest.get("hardware") or {}
    machine = [str(hardware[k]) for k in ("platform",) if hardware.get(k)]
    if hardware.get("cpus"):
        machine.append(f"{hardware['cpus']} CPUs, {hardware.get('torch_threads', '?')} threads")
    machine += [str(name) for name in hardware.get("gpus") or []]
    packages = dict(manifest.get("packages") or {})
    if hardware.get("python"):
        packages = {"python": hardware["python"], **packages}
    metadata = {
        "seed": manifest.get("seed"),
        "time": duration(manifest["seconds"]) if "seconds" in manifest else None,
        "started": ", ".join(manifest.get("began") or []),
        "config key": manifest.get("key"),
        "rlt": manifest.get("rlt"),
        "git revision": manifest.get("git"),
        "machine": "; ".join(machine),
        "packages": ", ".join(f"{name} {version}" for name, version in packages.items()),
    }
    rows = [
        [name, heading(str(value))] for name, value in metadata.items() if value not in (None, "")
    ]
    command = " ".join(["rlt", *map(str, manifest.get("command") or [])])
    return f"{fenced(command)}\n\n{table(['fact', 'value'], rows)}"
