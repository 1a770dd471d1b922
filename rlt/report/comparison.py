"""Evaluations of a pipeline side by side: accuracies, paired differences and their verdicts.

The last evaluation of a set of questions is the reference: it is the one that the pipeline was run
for. It is compared with every other evaluation of the same questions, paired by question.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlt.evaluation.benchmark import compare_answers
from rlt.evaluation.statistics import Interval
from rlt.report.folder import Run
from rlt.report.results import accuracy, accuracy_k
from rlt.report.text import heading, metric_value
from rlt.runs.formatting import points

EVALUATE = "evaluate"


@dataclass(frozen=True)
class Step:
    """One entry of steps.json."""

    name: str
    stage: str
    label: str
    run: Run
    reused: bool
    seconds: float
    inputs: tuple[str, ...] | None = None  # names of the steps that it reads; None if not recorded

    @property
    def metrics(self) -> dict[str, float]:
        """Final metrics of the step."""
        return self.run.metrics


def verdict_of(difference: Interval) -> str:
    """Return `better`, `worse` or `within noise` for the reference.

    Args:
        difference: `reference - other`, with its interval; higher must be better.
    """
    if difference.low <= 0 <= difference.high:
        return "within noise"
    return "better" if difference.mean > 0 else "worse"


@dataclass(frozen=True)
class Comparison:
    """`reference` minus `other`, over the same questions."""

    reference: Step
    other: Step
    difference: Interval

    @property
    def verdict(self) -> str:
        """`better`, `worse` or `within noise`, said of the reference."""
        return verdict_of(self.difference)

    @property
    def sentence(self) -> str:
        """One Markdown sentence with the verdict, and the difference in percentage points."""
        better, worse = heading(self.reference.label), heading(self.other.label)
        interval = (
            f"{points(self.difference.mean)} points "
            f"[{points(self.difference.low)}, {points(self.difference.high)}]"
        )
        if self.verdict == "within noise":
            return f"{better} against {worse}: {self.verdict}, {interval}."
        return f"{better} is {self.verdict} than {worse}: {interval}."


@dataclass
class Benchmark:
    """Evaluations that answered the same questions, in the pipeline's order."""

    name: str
    steps: list[Step] = field(default_factory=list)

    @property
    def k(self) -> int | None:
        """Sampled answers per question, or None if the evaluations differ in it."""
        ks = {accuracy_k(step.metrics) for step in self.steps}
        return ks.pop() if len(ks) == 1 else None


def steps_of(entries: Sequence[Mapping[str, Any]], run_dir: Path) -> list[Step]:
    """Return the steps in the order of steps.json; relative folders are below `run_dir`."""
    return [
        Step(
            name=str(entry["name"]),
            stage=str(entry["stage"]),
            label=str(entry.get("label") or entry["name"]),
            run=Run(run_dir / str(entry["dir"]), dict(entry.get("metrics") or {})),
            reused=bool(entry.get("reused")),
            seconds=float(entry.get("seconds") or 0.0),
            inputs=tuple(entry["inputs"].values()) if "inputs" in entry else None,
        )
        for entry in entries
    ]


def benchmarks_of(steps: Sequence[Step]) -> list[Benchmark]:
    """Group the evaluations among the steps by the questions that they answered."""
    groups: dict[frozenset[str], Benchmark] = {}
    for step in steps:
        if step.stage == EVALUATE and accuracy_k(step.metrics) is not None:
            questions = frozenset(answer.problem_id for answer in step.run.answers)
            group = groups.setdefault(questions, Benchmark(step.run.benchmark_name))
            group.steps.append(step)
    return list(groups.values())


def compare(benchmark: Benchmark) -> list[Comparison]:
    """Compare the last evaluation with each of the others; [] if its answers are missing."""
    *others, reference = benchmark.steps
    if not reference.run.answers:
        return []
    return [
        Comparison(reference, other, compare_answers(reference.run.answers, other.run.answers))
        for other in others
    ]


def accuracy_header(benchmark: Benchmark) -> list[str]:
    """Return the column titles for `accuracy_rows`."""
    k = "k" if benchmark.k is None else str(benchmark.k)
    header = ["evaluation", f"avg@{k} [95 % interval]"]
    return header + ([f"pass@{k}"] if k != "1" else []) + ["no answer", "questions"]


def accuracy_rows(benchmark: Benchmark) -> list[list[str]]:
    """One row of texts per evaluation, under `accuracy_header`."""
    rows = []
    for step in benchmark.steps:
        metrics, k = step.metrics, accuracy_k(step.metrics)
        note = f" (k = {k})" if benchmark.k is None else ""
        row = [step.label + note, accuracy(metrics, f"eval/avg@{k}")]
        if benchmark.k != 1:
            row.append(_value(metrics, f"eval/pass@{k}"))
        row += [_value(metrics, f"eval/{name}") for name in ("no_answer_rate", "questions")]
        rows.append(row)
    return rows


def _value(metrics: Mapping[str, float], name: str) -> str:
    return metric_value(name, metrics[name]) if name in metrics else "-"
