"""What counts as an answer: hand-made completions with the block that a reader would take."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlt.evaluation.answers import extract_answer, unwrap_boxed

OPEN, CLOSE = "<answer>", "</answer>"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 6 </think> <answer> 6 </answer>", "6"),
        ("so 6 </think> <answer>\n\n6\n\n</answer> trailing", "6"),
        ("so 6 </think> <answer> 6", "6"),  # the closing tag was the stop string
        ("so it is 6", None),
        ("so it is 6 </answer>", None),
        ("", None),
        ("<answer>1</answer> no: <answer>2</answer>", "2"),
        ("<answer>1</answer> no: <answer>2", "1"),  # the last complete one
        ("<answer>1 <answer>2</answer>", "2"),
        ("<answer>1</answer> 2</answer>", "1"),
        ("</answer> <answer>3", "3"),
        ("<answer>  </answer>", ""),
        ("<answer>", ""),
        ("<answer>x < 3 </answe</answer>", "x < 3 </answe"),
    ],
)
def test_extract_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text, OPEN, CLOSE) == answer


@pytest.mark.parametrize("tags", [("<a>", "</a>"), ("<|begin_of_solution|>", "<|end.*|>")])
@given(before=st.text(), inside=st.text())
def test_a_complete_block_is_found_whatever_surrounds_it(
    tags: tuple[str, str], before: str, inside: str
) -> None:
    assert extract_answer(before + tags[0] + inside + tags[1], *tags) == inside.strip()


def test_empty_tags_are_refused() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        extract_answer("6", "", CLOSE)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{42}", "42"),
        (r"so $\boxed{ \frac{1}{2} }$.", r"\frac{1}{2}"),
        (r"\boxed{1}, better \boxed{2}", "2"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),  # escaped braces balance nothing
        (r"\boxed{a} and \boxed{b", "a"),  # the last was cut off
        (r"\fbox{7}", "7"),
        (r"\boxed {8}", "8"),
        (r"\boxed{}", ""),
        (r"\boxed{9", None),
        (r"\boxed{9\\", None),
        ("42", None),
    ],
)
def test_unwrap_boxed(text: str, content: str | None) -> None:
    assert unwrap_boxed(text) == content
