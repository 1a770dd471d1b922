"""Damaged copies, labels and areas of the reward preflight."""

import random
from typing import Any

import pytest

from rlt.rewards.preflight import (
    CORRUPTIONS,
    WHOLE,
    Area,
    Preflight,
    areas,
    corrupted,
    ends_in,
)

TEXT = "12 + 30 = 42\n42 - 5 = 37"


def damaged(name: str, text: str = TEXT, other: str = "1 + 1 = 2") -> str:
    return CORRUPTIONS[name](text, "37", other, random.Random(0))


def test_one_digit_of_one_result_is_altered() -> None:
    for seed in range(20):
        copy = CORRUPTIONS["altered_digit"](TEXT, "37", "", random.Random(seed))
        places = [n for n, (a, b) in enumerate(zip(TEXT, copy, strict=True)) if a != b]
        assert places in ([11], [23])  # the last digit of 42 or of 37, behind the equals signs
        assert copy[places[0]].isdigit()


def test_without_a_result_any_digit_is_altered() -> None:
    copy = damaged("altered_digit", "3 8 0")
    assert sum(a != b for a, b in zip("3 8 0", copy, strict=True)) == 1
    assert damaged("altered_digit", "no digits") == "no digits"


def test_other_damages_by_hand() -> None:
    assert damaged("truncated") == "12 + 30 = 42"
    assert damaged("truncated", "a b c d e") == "a b"
    assert damaged("bare_solution") == "37"
    assert damaged("other_problem") == "1 + 1 = 2"


def test_copies_that_are_no_different_are_left_out() -> None:
    copies = corrupted(["a", "a", "b"], ["1", "2", "b"], "other_problem", seed=0)
    assert copies == [None, "b", "a"]
    assert corrupted(["1", "x"], ["1", "2"], "bare_solution", seed=0) == [None, "2"]


@pytest.mark.parametrize(
    ("text", "result"),
    [
        (TEXT, "37"),
        ("So the answer is 12 apples", "12"),
        ("x = 1/2", "1/2"),
        ("no number", "no number"),
        (r"So it is \boxed{\frac{1}{2}}, as was asked on page 7.", r"\frac{1}{2}"),
        ("", ""),
    ],
)
def test_what_an_explanation_ends_in(text: str, result: str) -> None:
    assert ends_in(text) == result


def test_areas_are_taken_where_there_are_enough_of_both() -> None:
    columns = {WHOLE: [*range(6), *range(6)], "term/mean": [0] * 12}
    labels: dict[str, list[bool | None]] = {
        "damaged": [True] * 6 + [False] * 6,
        "rare": [True] * 11 + [False],
        "partly": [None, *[True] * 5, None, *[False] * 5],
    }
    found = areas(columns, labels, [str(n % 6) for n in range(12)])
    assert [(one.against, one.term, one.good, one.bad) for one in found] == [
        ("damaged", WHOLE, 6, 6), ("damaged", "term/mean", 6, 6),
        ("partly", WHOLE, 5, 5), ("partly", "term/mean", 5, 5),
    ]  # fmt: skip
    assert all(one.interval.mean == 0.5 for one in found)
    assert [Area.read(one.row()) for one in found] == found


def settings(**changes: Any) -> Preflight:
    return Preflight(**{"problems": 8, "corruptions": ["truncated"], "lowest_area": 0.9, **changes})


def test_a_low_area_of_the_whole_reward_is_warned_of() -> None:
    columns = {WHOLE: [*range(5), *range(5)], "term/mean": [1] * 5 + [0] * 5}
    found = areas(columns, {"truncated": [True] * 5 + [False] * 5}, list("abcdeabcde"))
    warning = settings().warning(found)
    assert warning is not None
    assert "from truncated (0.50)" in warning
    assert "arm=able_teacher" in warning
    assert settings(lowest_area=0.5).warning(found) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"problems": 1}, "preflight.problems=1: it must be at least 2"),
        ({"lowest_area": 1.2}, "preflight.lowest_area=1.2: an area is between 0 and 1"),
        ({"corruptions": ["truncate"]}, "has 'truncate': choose among .*did you mean 'truncated'"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**change)
