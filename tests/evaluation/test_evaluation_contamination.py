"""Overlap of questions with training problems: exact, by runs of words, and where it is refused."""

import pytest

from rlt.data.problem import make_problem
from rlt.evaluation.contamination import Contamination, ngrams, words_of

TRAINED = [
    make_problem("Tom has 3 apples and buys 4 more.", "7", explanation="So 3 + 4 apples is 7."),
    make_problem("What is 2+2?", "4"),
]


def questions(*texts: str) -> list:
    return [make_problem(text, "1") for text in texts]


def test_words_and_runs() -> None:
    assert words_of('Tom\'s "3" apples, +4.') == ["tom", "s", "3", "apples", "+", "4"]
    assert ngrams("a b c d", 3) == {"a b c", "b c d"}
    assert ngrams("A  b", 3) == {"a b"}  # shorter: the whole of it
    assert ngrams("", 3) == set()


def test_shares_by_hand() -> None:
    limits = Contamination(ngram_words=4, max_exact_fraction=1.0, max_ngram_fraction=1.0)
    asked = questions(
        "tom has 3  apples and buys 4 more.",  # the same but for case and white space
        "Ann has 3 apples and buys 5.",  # shares "has 3 apples and"
        "So 3 + 4 apples is what?",  # shares words with an explanation
        "Something else entirely, it seems.",
    )
    assert limits.check(TRAINED, asked) == {
        "eval/contamination_exact_fraction": 0.25,
        "eval/contamination_ngram_fraction": 0.75,
    }


def test_too_much_is_refused_with_examples() -> None:
    limits = Contamination(ngram_words=4, max_exact_fraction=0.2, max_ngram_fraction=1.0)
    with pytest.raises(
        ValueError, match=r"1 of 2 questions \(50\.0 %\) .*max_exact_fraction=0\.2: "
    ):
        limits.check(TRAINED, questions("what is 2+2?", "What is 3+3?"))
    limits = Contamination(ngram_words=3, max_exact_fraction=1.0, max_ngram_fraction=0.0)
    with pytest.raises(
        ValueError, match=r"\(ngram\), more than contamination\.max_ngram_fraction=0"
    ):
        limits.check(TRAINED, questions("Ann has 3 apples."))
    arithmetic = Contamination(ngram_words=3, max_exact_fraction=0.0, max_ngram_fraction=1.0)
    trained_on = [make_problem("(1 + 2) * 3.5", "10.5")]
    assert arithmetic.check(trained_on, questions("1 + (2 * 3,5)")) == {
        "eval/contamination_exact_fraction": 0.0,  # other signs, another question
        "eval/contamination_ngram_fraction": 1.0,  # the same words: brackets are none
    }
    assert (
        limits.check([], questions("Ann has 3 apples."))["eval/contamination_ngram_fraction"] == 0
    )


@pytest.mark.parametrize(
    ("values", "named"),
    [((0, 0.5, 0.5), "ngram_words=0"), ((3, 1.5, 0.5), "max_exact_fraction=1.5")],
)
def test_limits_that_are_refused(values: tuple, named: str) -> None:
    with pytest.raises(ValueError, match=f"contamination.{named}"):
        Contamination(*values)
