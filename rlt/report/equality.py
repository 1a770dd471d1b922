"""Whether two runs have the same results, bit for bit, and where the results first differ.

Metrics that depend on the clock or the machine (`time/`, `resources/`) are not compared.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rlt.report.folder import Run, read_json_list, read_jsonl, read_traces
from rlt.runs.identity import flatten

ABSENT = "-"
Changes = dict[Any, tuple[Any, Any]]


class Difference(NamedTuple):
    """One place in which results differ: file, tag or metric, with its step or row.

    `step` is the training step of the place: -1 before training, infinite after it.
    """

    where: str
    a: Any
    b: Any
    step: float


class ResultComparison(NamedTuple):
    """Counts of what was compared, by kind, and every difference, ordered by step."""

    compared: Counter[str]
    differences: list[Difference]

    def __str__(self) -> str:
        if self.differences:
            where, a, b, _ = self.differences[0]
            return f"differs first at {where}: {a} and {b}"
        metrics, scalars, tags, rows, models = (
            f"{self.compared[kind]} {kind}{'s' * (self.compared[kind] != 1)}"
            for kind in ("metric", "scalar", "tag", "row", "model")
        )
        kinds = {"metric": metrics, "scalar": f"{scalars} in {tags}", "row": rows}
        kinds["model"] = f"weights of {models}"
        found = [text for kind, text in kinds.items() if self.compared[kind]]
        return f"equal: {', '.join(found)}" if found else "neither run has results to compare"


class _Series(NamedTuple):
    """The values of one file, tag or metric: (order, where) → (training step, value)."""

    kind: str
    length: int
    values: dict[tuple[int, str], tuple[float, Any]]


def compare_results(a: Path, b: Path) -> ResultComparison:
    """Compare metrics, TensorBoard scalars, rows and weights of two runs.

    Pipelines are compared step by step.
    """
    steps_a, steps_b = pipeline_steps(a), pipeline_steps(b)
    if not steps_a and not steps_b:
        return _compare_run(a, b)
    compared: Counter[str] = Counter()
    differences: list[Difference] = []
    for name in dict.fromkeys([*steps_a, *steps_b]):
        if name in steps_a and name in steps_b:
            step = compare_results(steps_a[name][0], steps_b[name][0])
            compared += step.compared
            differences += [d._replace(where=f"step {name}, {d.where}") for d in step.differences]
        else:
            there = ("made", ABSENT) if name in steps_a else (ABSENT, "made")
            differences.append(Difference(f"step {name}", *there, math.inf))
    # A pipeline's own metrics repeat those of its steps.
    return ResultComparison(compared, differences or _compare_run(a, b).differences)


def pipeline_steps(folder: Path) -> dict[str, tuple[Path, list[str]]]:
    """Return each step of a pipeline, in order, or nothing if the run is not a pipeline.

    Returns:
        Name → (folder, config keys whose values are results of earlier steps).
    """
    file = folder / "steps.json"
    steps = {}
    for entry in read_json_list(file) if file.is_file() else []:
        link = folder / "steps" / entry["name"]
        made = link if link.is_dir() else Path(entry["dir"])
        steps[entry["name"]] = (made, list(entry["inputs"]))
    return steps


def untimed(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that do not depend on the clock or the machine."""
    return {n: v for n, v in named.items() if not {"time", "resources"} & set(n.split("/"))}


def changes_between(a: Mapping[Any, Any], b: Mapping[Any, Any]) -> Changes:
    """Return name → (value in a, value in b) for each name whose values differ.

    A missing value is `-`. The comparison is bit for bit: NaN equals NaN, and 0.0 differs from
    -0.0.
    """
    pairs = {name: (a.get(name, ABSENT), b.get(name, ABSENT)) for name in {**a, **b}}
    return {name: pair for name, pair in pairs.items() if repr(pair[0]) != repr(pair[1])}


def _compare_run(a: Path, b: Path) -> ResultComparison:
    all_a, all_b = _series(a), _series(b)
    compared: Counter[str] = Counter()
    found = list(_weights(a, b, compared))  # they precede the metrics that are measured on them
    for name in {**all_a, **all_b}:
        empty = _Series("", 0, {})
        series_a, series_b = all_a.get(name, empty), all_b.get(name, empty)
        kind = series_a.kind or series_b.kind
        places = len({**series_a.values, **series_b.values})
        compared[kind] += places if kind == "scalar" else max(series_a.length, series_b.length)
        compared["tag"] += kind == "scalar"
        if changes := changes_between(series_a.values, series_b.values):
            order, where = min(changes, key=lambda place: place[0])
            pair = [s.values.get((order, where), (math.inf, ABSENT)) for s in (series_a, series_b)]
            found.append(Difference(where, pair[0][1], pair[1][1], min(step for step, _ in pair)))
    # A stable sort: at the same step, rows come before the scalars that were measured on them.
    return ResultComparison(compared, sorted(found, key=lambda difference: difference.step))


def _series(folder: Path) -> dict[str, _Series]:
    """Return the values of every row file, then of every tag, then of every metric, by name."""
    files = {file.name: read_jsonl(file) for file in sorted(folder.glob("*.jsonl"))}
    if (folder / "traces.parquet").is_file():
        files["traces.parquet"] = read_traces(folder)
    series = {}
    for name, rows in files.items():
        values = {
            (number, f"{name}, row {number}: {key}"): (row.get("step", 0), value)
            for number, row in enumerate(rows, start=1)
            for key, value in flatten(row).items()
            if key != "config"  # this only tells which run wrote the row
        }
        series[name] = _Series("row", len(rows), values)
    for tag, points in sorted(untimed(Run(folder).scalars).items()):
        values = {(step, f"{tag}, step {step}"): (step, value) for step, value in points}
        series[f"scalar {tag}"] = _Series("scalar", len(values), values)
    for name, value in untimed(Run(folder).metrics).items():
        step = -1 if name.startswith("start/") else math.inf
        values = {(0, f"metrics.json: {name}"): (step, value)}
        series[f"metric {name}"] = _Series("metric", 1, values)
    return series


def _weights(a: Path, b: Path, compared: Counter[str]) -> Iterator[Difference]:
    """Yield the first difference of the final models; files with equal hashes are not loaded."""
    from safetensors.torch import load_file

    files_a, files_b = (sorted((run / "model").glob("*.safetensors")) for run in (a, b))
    compared["model"] += bool(files_a or files_b)
    names_a, names_b = (", ".join(f.name for f in files) or ABSENT for files in (files_a, files_b))
    if names_a != names_b:
        yield Difference("model: files", names_a, names_b, math.inf)
        return
    for pair in zip(files_a, files_b, strict=True):
        digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in pair]
        if digests[0] == digests[1]:
            continue
        tensors_a, tensors_b = map(load_file, pair)
        names = sorted({**tensors_a, **tensors_b})
        differing = [n for n in names if not _same_tensor(tensors_a.get(n), tensors_b.get(n))]
        if not differing:
            yield Difference(f"model/{pair[0].name}: bytes", digests[0], digests[1], math.inf)
            return
        old, new = tensors_a.get(differing[0]), tensors_b.get(differing[0])
        about = f"model, {differing[0]} ({len(differing)} of {len(names)} tensors)"
        if old is None or new is None or old.shape != new.shape:
            shapes = [ABSENT if t is None else tuple(t.shape) for t in (old, new)]
            yield Difference(f"{about}: shape", shapes[0], shapes[1], math.inf)
            return
        apart = (old.double() - new.double()).abs().flatten()
        at = int(apart.argmax())
        about += f", largest difference {float(apart[at]):.3g}"
        yield Difference(about, float(old.flatten()[at]), float(new.flatten()[at]), math.inf)
        return


def _same_tensor(a: Any, b: Any) -> bool:
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
