"""Monitors of reward hacking, by hand; when the callback rings and when it stays silent."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from rlt.rewards.monitors import (
    early_excess,
    early_fraction,
    first_position,
    outside,
    range_text,
    repetition,
)
from rlt.training.callbacks import HackingMonitor


@pytest.mark.parametrize(
    ("solution", "text", "place"),
    [
        ("6", "is 6 is 6", 3 / 9),
        ("6", "16 66 6", 6 / 7),  # by itself, not within a number
        ("6", "16 66", None),
        ("x = 2", "so X = 2.", 3 / 9),
        ("(1+1)", "a (1+1) b", 2 / 9),  # nothing of it is a pattern
        (" ", "a b", None),
        ("6", "", None),
    ],
)
def test_first_position(solution: str, text: str, place: float | None) -> None:
    assert first_position(solution, text) == (None if place is None else pytest.approx(place))


def test_early_share_and_what_chance_gives() -> None:
    leaks = ["is 6 is 6", "is 6 then 6", "is 2 is 2", "is 2 so 2"]
    solutions = ["6", "6", "2", "2"]
    assert early_fraction(solutions, leaks) == 1.0
    assert early_excess(solutions, leaks, group=2) == 1.0
    # Both solutions stand early in every text: nothing is told that chance would not.
    both = ["2 6 1 1 1 1 6", "6 2 1 1 1 1 6", "6 2 1 1 1 1 2", "2 6 1 1 1 1 2"]
    assert early_fraction(solutions, both) == 1.0
    assert early_excess(solutions, both, group=2) == 0.0
    late = ["1 1 1 1 1 1 6"] * 2 + ["1 1 1 1 1 1 2"] * 2
    assert early_fraction(solutions, late) == 0.0


def test_repetition() -> None:
    assert repetition("is 6 is 6") == pytest.approx(1 / 3)
    assert repetition("1 2 3 4") == 0.0
    assert repetition("a a a a a") == pytest.approx(3 / 4)
    assert repetition("one") == repetition("") == 0.0


def test_ranges() -> None:
    assert outside(0.4, None, 0.3) and not outside(0.3, None, 0.3)
    assert outside(0.05, 0.1, None) and not outside(0.1, 0.1, None)
    assert outside(3, 0.5, 2) and outside(0.1, 0.5, 2) and not outside(1, 0.5, 2)
    texts = [range_text(None, 0.3), range_text(0.1, None), range_text(0.5, 2)]
    assert texts == ["at most 0.3", "at least 0.1", "0.5 to 2"]


# --- the callback ---------------------------------------------------------------------------------


class Module:
    monitor_every_steps = 1

    def __init__(self) -> None:
        self.logged: list[tuple[str, float]] = []

    def log(self, name: str, value: float) -> None:
        self.logged.append((name, value))


def feed(watch: HackingMonitor, values: list[dict[str, float]], start: int = 0) -> Module:
    module: Any = Module()
    for step, metrics in enumerate(values, start=start):
        trainer: Any = SimpleNamespace(callback_metrics=metrics)
        watch.on_train_batch_end(trainer, module, None, None, step)
    return module


def leak(value: float, tokens: float = 10.0) -> dict[str, float]:
    return {"monitor/solution_early_excess": value, "train/completion_tokens": tokens}


def test_it_rings_once_each_time_a_mean_leaves_its_range(caplog: Any) -> None:
    watch = HackingMonitor(2, 3, {"solution_early_excess": [None, 0.3]})
    with caplog.at_level(logging.WARNING):
        feed(watch, [leak(0.9), leak(0.9)])  # too early to say
        assert not caplog.records
        feed(watch, [leak(0.2), leak(0.3), leak(0.5)], start=2)
        rung = [record.getMessage() for record in caplog.records]
        # (0.9 + 0.2) / 2 at step 3, back at 0.25, then (0.3 + 0.5) / 2.
        assert [message[: message.index(". The")] for message in rung] == [
            "step 3: monitor/solution_early_excess is 0.55, healthy is at most 0.3",
            "step 5: monitor/solution_early_excess is 0.4, healthy is at most 0.3",
        ]
        feed(watch, [leak(0.9)], start=5)
        assert len(caplog.records) == 2  # still the same alarm


def test_length_drift_is_measured_from_the_first_look_and_survives_a_checkpoint(
    caplog: Any,
) -> None:
    ranges = {"length_drift": [0.5, 2.0]}
    watch = HackingMonitor(1, 1, ranges)
    module = feed(watch, [leak(0.0, 8.0), leak(0.0, 12.0)])
    assert module.logged == [("monitor/length_drift", 1.0), ("monitor/length_drift", 1.5)]
    resumed = HackingMonitor(1, 1, ranges)
    resumed.load_state_dict(watch.state_dict())
    with caplog.at_level(logging.WARNING):
        assert feed(resumed, [leak(0.0, 20.0)], start=2).logged == [("monitor/length_drift", 2.5)]
    assert "monitor/length_drift is 2.5, healthy is 0.5 to 2" in caplog.text


def test_steps_without_a_look_are_passed_over() -> None:
    watch = HackingMonitor(3, 1, {"length_drift": [0.5, 2.0]})
    module: Any = Module()
    module.monitor_every_steps = 5
    trainer: Any = SimpleNamespace(callback_metrics=leak(0.0))
    for step in range(11):
        watch.on_train_batch_end(trainer, module, None, None, step)
    assert len(module.logged) == 3
    bare: Any = SimpleNamespace(callback_metrics={"train/loss": 1.0})
    watch.on_train_batch_end(bare, module, None, None, 15)  # a module without monitors
    assert len(module.logged) == 3


@pytest.mark.parametrize("bounds", [[None, None], [2, 1], [1], [1, 2, 3]])
def test_ranges_that_are_refused(bounds: list[float | None]) -> None:
    with pytest.raises(ValueError, match=r"callbacks\.hacking\.ranges\.entropy="):
        HackingMonitor(1, 1, {"entropy": bounds})
    with pytest.raises(ValueError, match=r"callbacks\.hacking\.window=0"):
        HackingMonitor(0, 1, {"entropy": [0, None]})
