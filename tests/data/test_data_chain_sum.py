"""The behaviour of explanations of sums."""

import pytest

from rlt.data.sources.chain_sum import SumBehaviour, behaviour_of, expression_of, running_totals

QUESTION = "State the final answer to the following arithmetic problem: 4 - 6 - 0 + 3 ="


@pytest.mark.parametrize(
    ("explanation", "behaviour"),
    [
        ("4 - 6 = -2\n-2 - 0 = -2\n-2 + 3 = 1", "right"),
        ("  4 - 6 = -2\n-2 - 0 = -2 \n-2 + 3 = 1\n", "right"),
        ("4 - 6 = -2\n-2 - 0 = -2\n-2 + 3 = 1\nThe answer is 1.", "right"),
        ("4 - 6 = -2\n-2 + 0 = 0\n0 + 3 = 1", "mended"),  # a sign and a sum are wrong
        ("4 - 6 = 9\n9 - 0 = 9\n9 + 3 = 1", "mended"),  # the last line has the solution
        ("4 - 6 = -2\n-2 - 0 = -2\n-2 + 3 = 5", "wrong"),
        ("4 - 6 = -3\n-3 - 0 = -3\n-3 + 3 = 0", "wrong"),  # the error is carried on to the end
        ("1", "leak"),
        ("4 - 6 - 0 + 3 = 1", "leak"),
        ("4 - 6 = -2\n-2 + 3 = 1", "leak"),  # right lines, but a step is missing
        ("the answer is 1", "leak"),
        ("I do not know", "wrong"),
        ("", "wrong"),
    ],
)
def test_behaviours_by_hand(explanation: str, behaviour: str) -> None:
    assert behaviour_of(QUESTION, "1", explanation) == behaviour
    assert behaviour in SumBehaviour.names
    assert behaviour_of(QUESTION, "1", explanation, closed=False) == "unclosed"


def test_negative_numbers_are_numbers() -> None:
    question = "Calculate -1 - -6 + 60 ="
    assert expression_of(question) == "-1 - -6 + 60"
    assert behaviour_of(question, "65", running_totals("-1 - -6 + 60")) == "right"


def test_a_question_without_a_sum_is_refused() -> None:
    with pytest.raises(ValueError, match="'How are you\\?' contains no sum"):
        behaviour_of("How are you?", "1", "4 - 3 = 1")


def test_only_right_is_good() -> None:
    assert SumBehaviour.good == ("right",)
    assert SumBehaviour()(QUESTION, "1", "1") == "leak"
