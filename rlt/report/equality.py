"""Whether two runs have the same results, bit for bit, and where they first part.

What depends on the clock (`time/`, `resources/`) is no result and is left out.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlt.report.folder import Run, read_json_list, read_jsonl, read_traces
from rlt.runs.identity import flatten

ABSENT = "-"
_TIMED = {"time", "resources"}  # parts of the names of scalars that no two runs share
_KEY_OF_RUN = "config"  # of a trace: which run wrote it, not what
Changes = dict[str, tuple[Any, Any]]


@dataclass(frozen=True)
class Difference:
    """One place in which two runs' results differ.

    Attributes:
        where: file, tag or metric, with its step or row.
        step: training step that it belongs to; -1 before training, infinite after it.
    """

    where: str
    a: Any
    b: Any
    step: float

    def __str__(self) -> str:
        return f"{self.where}: {self.a} and {self.b}"


@dataclass(frozen=True)
class ResultComparison:
    """What was compared, by kind, and every difference, in the order in which it came about."""

    compared: Counter[str]
    differences: list[Difference]

    def __str__(self) -> str:
        if self.differences:
            return f"differs first at {self.differences[0]}"
        if not self.compared.total():
            return "nothing to compare: neither run has results"
        c = self.compared
        kinds = {
            "metrics": _count(c["metrics"], "metric"),
            "scalars": f"{_count(c['scalars'], 'scalar')} in {_count(c['tags'], 'tag')}",
            "rows": _count(c["rows"], "row"),
            "models": f"weights of {_count(c['models'], 'model')}",
        }
        return "equal: " + ", ".join(text for kind, text in kinds.items() if c[kind])


@dataclass(frozen=True)
class PipelineStep:
    """Where a step's result lies, and which of its config keys name an earlier step's."""

    folder: Path
    inputs: tuple[str, ...]


def compare_results(a: Path, b: Path) -> ResultComparison:
    """Metrics, TensorBoard scalars, rows and weights of two runs; of pipelines, of every step."""
    steps_a, steps_b = pipeline_steps(a), pipeline_steps(b)
    compared: Counter[str] = Counter()
    differences: list[Difference] = []
    for name in dict.fromkeys([*steps_a, *steps_b]):
        if name in steps_a and name in steps_b:
            step = compare_results(steps_a[name].folder, steps_b[name].folder)
            compared += step.compared
            differences += [
                Difference(f"step {name}, {d.where}", d.a, d.b, d.step) for d in step.differences
            ]
        else:
            there = ("made", ABSENT) if name in steps_a else (ABSENT, "made")
            differences.append(Difference(f"step {name}", *there, math.inf))
    if not steps_a and not steps_b:
        parts = (_rows, _scalars, _weights, _metrics)
        found = [d for part in parts for d in part(a, b, compared)]
        # A stable sort: at the same step, what was written comes before what was measured on it.
        differences = sorted(found, key=lambda d: d.step)
    elif not differences:  # a pipeline's own metrics repeat those of its steps
        differences = list(_metrics(a, b, Counter()))
    return ResultComparison(compared, differences)


def pipeline_steps(folder: Path) -> dict[str, PipelineStep]:
    """The steps of a pipeline's run by name, in their order; {} of a run that is no pipeline."""
    file = folder / "steps.json"
    steps = {}
    for entry in read_json_list(file) if file.is_file() else []:
        link = folder / "steps" / entry["name"]
        made = link if link.is_dir() else Path(entry["dir"])
        steps[entry["name"]] = PipelineStep(made, tuple(entry["inputs"]))
    return steps


def untimed(named: Mapping[str, Any]) -> dict[str, Any]:
    """What does not depend on the clock."""
    return {name: value for name, value in named.items() if not _TIMED & set(name.split("/"))}


def changes_between(a: Mapping[str, Any], b: Mapping[str, Any]) -> Changes:
    """Name → (value in a, value in b) where they differ, `-` where there is none."""
    pairs = {n: (a.get(n, ABSENT), b.get(n, ABSENT)) for n in dict.fromkeys([*a, *b])}
    return {name: pair for name, pair in pairs.items() if not _same(*pair)}


def _rows(a: Path, b: Path, compared: Counter[str]) -> Iterator[Difference]:
    """The first differing row of every file of rows."""
    for name in sorted({f.name for folder in (a, b) for f in folder.glob("*.jsonl")}):
        rows_a, rows_b = read_jsonl(a / name), read_jsonl(b / name)
        yield from _first_row(name, rows_a, rows_b, compared)
    name = "traces.parquet"
    if (a / name).is_file() or (b / name).is_file():
        yield from _first_row(name, read_traces(a), read_traces(b), compared)


def _first_row(
    name: str, rows_a: list[dict[str, Any]], rows_b: list[dict[str, Any]], compared: Counter[str]
) -> Iterator[Difference]:
    compared["rows"] += max(len(rows_a), len(rows_b))
    for number, (row_a, row_b) in enumerate(zip(rows_a, rows_b, strict=False), start=1):
        changes = changes_between(flatten(row_a), flatten(row_b))
        changes.pop(_KEY_OF_RUN, None)
        if changes:
            key, (old, new) = next(iter(changes.items()))
            step = min(row_a.get("step", 0), row_b.get("step", 0))
            yield Difference(f"{name}, row {number}: {key}", old, new, step)
            return
    if len(rows_a) != len(rows_b):
        longer = max(rows_a, rows_b, key=len)
        step = longer[min(len(rows_a), len(rows_b))].get("step", 0)
        yield Difference(f"{name}: rows", len(rows_a), len(rows_b), step)


def _scalars(a: Path, b: Path, compared: Counter[str]) -> Iterator[Difference]:
    """The first differing step of every tag."""
    scalars_a, scalars_b = untimed(Run(a).scalars), untimed(Run(b).scalars)
    for tag in sorted(scalars_a.keys() | scalars_b.keys()):
        values_a, values_b = dict(scalars_a.get(tag, [])), dict(scalars_b.get(tag, []))
        steps = sorted(values_a.keys() | values_b.keys())
        compared["tags"] += 1
        compared["scalars"] += len(steps)
        for step in steps:
            old, new = values_a.get(step, ABSENT), values_b.get(step, ABSENT)
            if not _same(old, new):
                yield Difference(f"{tag}, step {step}", old, new, step)
                break


def _weights(a: Path, b: Path, compared: Counter[str]) -> Iterator[Difference]:
    """The first differing tensor of the final model."""
    files_a, files_b = ({f.name: f for f in (r / "model").glob("*.safetensors")} for r in (a, b))
    if not files_a and not files_b:
        return
    compared["models"] += 1
    if files_a.keys() != files_b.keys():
        old, new = (", ".join(sorted(files)) or ABSENT for files in (files_a, files_b))
        yield Difference("model: files", old, new, math.inf)
        return
    for name in sorted(files_a):
        if _sha256(files_a[name]) != _sha256(files_b[name]):
            yield _first_tensor(files_a[name], files_b[name])
            return


def _first_tensor(a: Path, b: Path) -> Difference:
    """The first of the differing tensors of two files, by name, and how many there are."""
    from safetensors.torch import load_file

    tensors_a, tensors_b = load_file(a), load_file(b)
    names = sorted(tensors_a.keys() | tensors_b.keys())
    differ = [n for n in names if not _same_tensor(tensors_a.get(n), tensors_b.get(n))]
    if not differ:
        return Difference(f"model/{a.name}: bytes", _sha256(a), _sha256(b), math.inf)
    old, new = tensors_a.get(differ[0]), tensors_b.get(differ[0])
    about = f"model, {differ[0]} ({len(differ)} of {len(names)} tensors)"
    if old is None or new is None or old.shape != new.shape:
        shapes = [ABSENT if t is None else tuple(t.shape) for t in (old, new)]
        return Difference(f"{about}: shape", shapes[0], shapes[1], math.inf)
    apart = (old.double() - new.double()).abs()
    at = int(apart.argmax())
    about = f"{about}, largest difference {float(apart.max()):.3g}"
    return Difference(about, float(old.flatten()[at]), float(new.flatten()[at]), math.inf)


def _same_tensor(a: Any, b: Any) -> bool:
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _metrics(a: Path, b: Path, compared: Counter[str]) -> Iterator[Difference]:
    metrics_a, metrics_b = untimed(Run(a).metrics), untimed(Run(b).metrics)
    compared["metrics"] += len(metrics_a.keys() | metrics_b.keys())
    for name, (old, new) in changes_between(metrics_a, metrics_b).items():
        step = -1 if name.startswith("start/") else math.inf
        yield Difference(f"metrics.json: {name}", old, new, step)


def _same(a: Any, b: Any) -> bool:
    """Bit for bit: NaN is NaN, and 0.0 is not -0.0."""
    return repr(a) == repr(b)


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
