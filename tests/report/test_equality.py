"""Two run folders: what counts as equal, and which difference came first."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlt.report.difference import metadata_changes
from rlt.report.equality import compare_results
from tests.report.report_runs import Rows, make_run, write_events, write_lines

SCALARS: Rows = {
    "train/loss": [(0, 3.0), (1, 2.0), (2, 1.0)],
    "validation/loss": [(2, 1.5)],
    "time/train_mfu": [(0, 0.1)],
}
METRICS = {"train/loss": 1.0, "start/validation/loss": 2.5, "resources/peak_memory_bytes": 1.0}


def training(folder: Path, scalars: Rows | None = None, **metrics: float) -> Path:
    run = make_run(folder, "distill", METRICS | metrics)
    write_events(run, SCALARS | (scalars or {}))
    return run


def first(a: Path, b: Path) -> tuple[str, object, object]:
    found = compare_results(a, b).differences[0]
    return found.where, found.a, found.b


def test_what_depends_on_the_clock_is_no_difference(tmp_path: Path) -> None:
    a = training(tmp_path / "a")
    b = training(tmp_path / "b", {"time/train_mfu": [(0, 0.2)]})
    metrics = METRICS | {"resources/peak_memory_bytes": 2.0}
    (b / "metrics.json").write_text(json.dumps(metrics))
    assert str(compare_results(a, b)) == "equal: 2 metrics, 4 scalars in 2 tags"


def test_the_earliest_step_comes_first(tmp_path: Path) -> None:
    a = training(tmp_path / "a")
    later = {"train/loss": [(0, 3.0), (1, 2.5), (2, 1.5)], "validation/loss": [(2, 2.0)]}
    b = training(tmp_path / "b", later)
    assert first(a, b) == ("train/loss, step 1", 2.0, 2.5)
    assert [d.step for d in compare_results(a, b).differences] == [1, 2]  # once for each tag
    (b / "metrics.json").write_text(json.dumps(METRICS | {"start/validation/loss": 2.0}))
    assert first(a, b) == ("metrics.json: start/validation/loss", 2.5, 2.0)


def test_a_step_or_a_tag_may_be_missing(tmp_path: Path) -> None:
    a = training(tmp_path / "a")
    b = training(tmp_path / "b", {"train/loss": [(0, 3.0), (1, 2.0)]})
    assert first(a, b) == ("train/loss, step 2", 1.0, "-")
    c = training(tmp_path / "c", {"train/grad_norm": [(0, 1.0)]})
    assert first(a, c) == ("train/grad_norm, step 0", "-", 1.0)


def test_bit_for_bit(tmp_path: Path) -> None:
    nan, zero = float("nan"), -0.0
    a, b = (training(tmp_path / n, gain=nan, drift=0.0) for n in "ab")
    assert compare_results(a, b).differences == []
    c = training(tmp_path / "c", gain=nan, drift=zero)
    assert first(a, c)[0] == "metrics.json: drift"


def test_rows(tmp_path: Path) -> None:
    a, b = (training(tmp_path / n) for n in "ab")
    row = {"step": 1, "text": "two", "terms": {"kl": 0.5}, "config": "key"}
    write_lines(a / "samples.jsonl", [row, row])
    write_lines(b / "samples.jsonl", [row | {"config": "another"}] * 2)
    assert str(compare_results(a, b)).endswith(", 2 rows")  # which run wrote them is no result
    write_lines(b / "samples.jsonl", [row, row | {"terms": {"kl": 0.25}}])
    assert first(a, b) == ("samples.jsonl, row 2: terms.kl", 0.5, 0.25)
    write_lines(b / "samples.jsonl", [row])
    where, *values = first(a, b)
    assert where.startswith("samples.jsonl, row 2: ") and values == [1, "-"]  # a row is missing


def save_weights(run: Path, **tensors: torch.Tensor) -> None:
    (run / "model").mkdir(exist_ok=True)
    save_file(tensors, run / "model" / "model.safetensors")


def test_weights(tmp_path: Path) -> None:
    a, b = (training(tmp_path / n) for n in "ab")
    bias, weight = torch.zeros(2, dtype=torch.bfloat16), torch.ones(2, 2)
    save_weights(a, bias=bias, weight=weight)
    assert first(a, b) == ("model: files", "model.safetensors", "-")
    save_weights(b, bias=bias, weight=weight)
    assert str(compare_results(a, b)).endswith("weights of 1 model")
    changed = weight.clone()
    changed[1, 0] = 1.25
    save_weights(b, bias=bias, weight=changed)
    where = "model, weight (1 of 2 tensors), largest difference 0.25"
    assert first(a, b) == (where, 1.0, 1.25)
    save_weights(b, bias=bias, weight=weight[:1].clone())
    assert first(a, b) == ("model, weight (1 of 2 tensors): shape", (2, 2), (1, 2))


def pipeline(folder: Path, steps: dict[str, float]) -> Path:
    run = make_run(folder, "pipeline", {f"{n}/train/loss": v for n, v in steps.items()})
    entries = []
    for name, loss in steps.items():
        made = make_run(folder / "store" / name, "distill", {"train/loss": loss})
        entries.append({"name": name, "dir": str(made), "inputs": {}})
    (run / "steps.json").write_text(json.dumps(entries))
    return run


def test_a_pipeline_is_compared_step_by_step(tmp_path: Path) -> None:
    a = pipeline(tmp_path / "a", {"z_teacher": 1.0, "a_student": 2.0})
    b = pipeline(tmp_path / "b", {"z_teacher": 1.5, "a_student": 2.5})
    same = pipeline(tmp_path / "same", {"z_teacher": 1.0, "a_student": 2.0})
    assert str(compare_results(a, same)).startswith("equal: 2 metrics")
    assert first(a, b) == ("step z_teacher, metrics.json: train/loss", 1.0, 1.5)
    shorter = pipeline(tmp_path / "shorter", {"z_teacher": 1.0})
    assert first(a, shorter) == ("step a_student", "made", "-")
    (same / "metrics.json").write_text("{}")
    assert first(a, same) == ("metrics.json: z_teacher/train/loss", 1.0, "-")


@pytest.mark.parametrize(
    ("key", "value", "fact"),
    [
        ("git", "b" * 40, "git"),
        ("packages", {"torch": "2.14.0"}, "packages.torch"),
        ("hardware", {"torch_threads": 2}, "hardware.torch_threads"),
        ("inputs", {"data.source": "{'fingerprint': 'b'}"}, "inputs.data.source.fingerprint"),
        ("inputs", {"data.source": "{'fingerprint': 'a'}", "traces": "c"}, "inputs.traces"),
    ],
)
def test_facts(key: str, value: object, fact: str) -> None:
    manifest = {
        "git": "a" * 40,
        "packages": {"torch": "2.13.0"},
        "hardware": {"torch_threads": 1},
        "inputs": {"data.source": "{'fingerprint': 'a'}"},
        "began": ["2026-01-02T03:04:05+0000"],
    }
    assert metadata_changes(manifest, manifest | {"began": []}) == {}
    assert list(metadata_changes(manifest, manifest | {key: value})) == [fact]


def test_another_commit_of_the_same_code_is_the_same() -> None:
    a, b = {"git": "a", "code": "1"}, {"git": "b", "code": "1"}
    assert metadata_changes(a, b) == {}
    assert metadata_changes(a, b | {"code": "2"}) == {"git": ("a", "b"), "code": ("1", "2")}
