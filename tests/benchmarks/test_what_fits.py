"""The table of docs/hardware.md: sizes of the models, and what fits where."""

from pathlib import Path

import pytest

from benchmarks.what_fits import Sized, largest, peak
from rlt.preflight.memory_estimate import shape_of

PAGE = Path(__file__).parents[2] / "docs" / "hardware.md"


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("SmolLM2-135M", 134_515_008),  # of the models' cards
        ("Qwen2.5-0.5B", 494_032_768),
        ("Qwen2.5-7B", 7_615_616_512),
    ],
)
def test_sizes_are_those_of_the_published_models(model: str, parameters: int) -> None:
    assert shape_of(Sized(model, "float32")).parameters == parameters  # type: ignore[arg-type]


def test_the_page_has_what_is_computed() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `gpu_8gb` |")]
    for job, row in zip(("teacher_rl", "distill"), rows, strict=True):
        cells = [largest(job, "gpu_8gb", way, 400, 512) for way in ("none", "lora")]
        assert row.startswith(f"| `gpu_8gb` | {' | '.join(cells)} | ")


def test_an_adapter_and_codes_take_less() -> None:
    sizes = [
        peak("teacher_rl", "gpu_24gb", way, "Qwen2.5-1.5B", 100, 100)
        for way in ("none", "lora", "qlora")
    ]
    assert sizes[0] > 3 * sizes[1] and sizes[1] > 1.5 * sizes[2]
