"""Whether two runs made the same, bit for bit."""

from pathlib import Path
from typing import Any

import torch

from rlt.report import read_scalars
from tests.cli import read, read_lines, results, weights


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Curves but those of time, and of Lightning's `epoch`: a whole run is one."""
    found = read_scalars(run)
    return {k: v for k, v in found.items() if not k.startswith("time/") and k != "epoch"}


def last_checkpoint(run: Path) -> dict[str, Any]:
    entry = read(run / "checkpoints" / "manifest.json")[-1]
    file = run / "checkpoints" / f"step={entry['step']:08d}.ckpt"
    state: dict[str, Any] = torch.load(file, weights_only=True)
    state["callbacks"] = {
        name: {k: v for k, v in values.items() if k != "metrics"}
        for name, values in state["callbacks"].items()
    }
    del state["loops"]  # they count validations that were repeated
    return state


def assert_same(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for place, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_same(one, other, f"{where}[{place}]")
    else:
        assert a == b, where


def assert_same_training(run: Path, whole: Path) -> None:
    assert weights(run) == weights(whole)
    assert results(run) == results(whole)
    assert_same(scalars(run), scalars(whole))
    for name in ("samples.jsonl", "held_out_rewards.jsonl"):
        assert (run / name).is_file() == (whole / name).is_file()
        if (run / name).is_file():
            assert read_lines(run / name) == read_lines(whole / name)
    assert_same(last_checkpoint(run), last_checkpoint(whole))
    assert not list(run.rglob("*.tmp"))
