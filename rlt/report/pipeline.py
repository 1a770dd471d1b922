"""report.md of a pipeline: a comparison of its evaluations, then the result of each step.

The report is made from steps.json and the folders of the steps. Curves are copied into the
pipeline's own folder, so that this folder can be passed on alone.
"""

import shutil
from pathlib import Path

from rlt.report.comparison import (
    Benchmark,
    Step,
    accuracy_header,
    accuracy_rows,
    benchmarks_of,
    compare,
    steps_of,
)
from rlt.report.folder import Run, read_json_list
from rlt.report.html import write_html
from rlt.report.plots import plot_bars
from rlt.report.results import accuracy_k, result_lines
from rlt.report.run import (
    REPORT_FILE,
    asked_for,
    draw_plots,
    monitors,
    provenance,
    samples_section,
)
from rlt.report.text import heading, image_links, relative_url, table
from rlt.runs.formatting import duration, points

# The curves that show whether a step worked; its own report has the others.
_KEY_PLOTS = ("reward", "reward_terms", "behaviours", "loss", "completions", "traces")


def write_pipeline_report(run_dir: Path) -> Path:
    """Write plots/ and report.md of a pipeline, from its steps.json."""
    run = Run(run_dir)
    steps = steps_of(read_json_list(run_dir / "steps.json"), run_dir)
    date = str(run.manifest.get("ended") or (run.manifest.get("began") or [""])[-1])
    title = heading("pipeline") + (f" · {date[:16].replace('T', ' ')}" if date else "")
    benchmarks = benchmarks_of(steps)
    parts = [f"# {title}", *([heading(run.note)] if run.note else [])]
    asked = asked_for(run)
    parts += [f"## What was asked for\n\n{asked}"] if asked else []
    for number, benchmark in enumerate(benchmarks):
        parts.append(_benchmark_section(benchmark, run_dir, number))
    if not benchmarks:
        parts.append("This pipeline has no evaluate step: it says nothing of accuracy.")
    parts += ["## Steps", _steps_table(steps)]
    parts += [_step_section(step, run_dir) for step in steps]
    made = provenance(run.manifest)
    parts += ["## How it was made", made] if made else []
    file = run_dir / REPORT_FILE
    file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    write_html(file)
    return file


def _benchmark_section(benchmark: Benchmark, run_dir: Path, number: int) -> str:
    parts = [f"## Accuracy{' on ' + heading(benchmark.name) if benchmark.name else ''}"]
    comparisons = compare(benchmark)
    if comparisons:
        parts.append("\n".join(f"- {comparison.sentence}" for comparison in comparisons))
    rows = [[heading(row[0]), *row[1:]] for row in accuracy_rows(benchmark)]
    parts.append(table(accuracy_header(benchmark), rows))
    bars = []
    for step in benchmark.steps:
        name = f"eval/avg@{accuracy_k(step.metrics)}"
        share = step.metrics[name]
        low, high = (step.metrics.get(f"{name}_{end}", share) for end in ("low", "high"))
        bars.append((step.label, share, low, high))
    k = "k" if benchmark.k is None else benchmark.k
    title = f"avg@{k}{' on ' + benchmark.name if benchmark.name else ''}, 95 % intervals"
    file = run_dir / "plots" / ("accuracy.png" if number == 0 else f"accuracy_{number + 1}.png")
    parts.append(image_links([plot_bars(bars, title, file)], run_dir))
    if comparisons:
        label = heading(comparisons[0].reference.label)
        rows = [
            [
                heading(c.other.label),
                points(c.difference.mean),
                f"[{points(c.difference.low)}, {points(c.difference.high)}]",
                c.verdict,
            ]
            for c in comparisons
        ]
        parts.append(f"Differences of **{label}** to each, in points, paired by question:")
        parts.append(table([f"{label} against", "difference", "95 % interval", "verdict"], rows))
    parts.append(
        "Intervals are bootstrapped over the questions. They hold for these very models: how much "
        "training again with another seed would change is not in them."
    )
    return "\n\n".join(parts)


def _steps_table(steps: list[Step]) -> str:
    header = ["step", "stage", "status", "time"]
    rows = [[heading(s.name), heading(s.stage), status(s), duration(s.seconds)] for s in steps]
    total = sum(step.seconds for step in steps if not step.reused)
    return table(header, [*rows, ["total of the new ones", "", "", duration(total)]])


def status(step: Step) -> str:
    """Return `reused` or `new`, for the tables of steps."""
    return "reused" if step.reused else "new"


def _step_section(step: Step, run_dir: Path) -> str:
    label = "" if step.label == step.name else f" · {heading(step.label)}"
    parts = [f"## {heading(step.name)} ({heading(step.stage)}){label}"]
    parts.append("\n".join(f"- {line}" for line in result_lines(step.run)))
    parts.append(image_links(_copy_plots(step, run_dir / "plots" / step.name), run_dir))
    parts.append(monitors(step.run))
    parts.append(samples_section(step.run, each=1))
    own = step.run.folder / REPORT_FILE
    if own.is_file():
        parts.append(f"[The step's own report]({relative_url(own, run_dir)})")
    return "\n\n".join(part for part in parts if part)


def _copy_plots(step: Step, folder: Path) -> list[Path]:
    """Copy the key plots from the step's folder, or draw them if it has no plots."""
    theirs = sorted((step.run.folder / "plots").glob("*.png"))
    if not theirs:
        return [file for file in draw_plots(step.run, folder) if file.stem in _KEY_PLOTS]
    key_plots = [file for stem in _KEY_PLOTS for file in theirs if file.stem == stem]
    if key_plots:
        folder.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copy(file, folder / file.name)) for file in key_plots]
