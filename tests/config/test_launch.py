"""How many ranks a config asks for."""

from types import SimpleNamespace
from typing import Any

import pytest

from rlt.cli.launch import launched, refuse_sweep
from rlt.runs.ranks import devices_of


@pytest.mark.parametrize(
    ("devices", "count"), [(1, 1), (2, 2), ("3", 3), ([0, 2], 2), ("auto", 1), (-1, 1)]
)
def test_devices_are_counted(devices: Any, count: int) -> None:
    assert devices_of(SimpleNamespace(devices=devices, accelerator="cpu")) == count


@pytest.mark.parametrize("devices", ["two", 0, -2, [], None])
def test_what_is_no_number_of_devices_is_refused(devices: Any) -> None:
    with pytest.raises(ValueError, match=r"hardware\.devices=.*: give the number of devices"):
        devices_of(SimpleNamespace(devices=devices, accelerator="cpu"))


def test_a_rank_starts_no_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not launched()
    refuse_sweep()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="run it without torchrun or srun"):
        refuse_sweep()
