"""Digit chains: the arithmetic and each behaviour, with examples written by hand."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlt.data.row_checks import collect_problems
from rlt.data.sources.digit_chain import DigitChain
from rlt.data.sources.digit_chain_text import (
    BEHAVIOURS,
    VAGUE_WORDS,
    behaviour_of,
    read_question,
    running_results,
    write_question,
)
from rlt.llm.digit_words import vocabulary

QUESTION, SOLUTION = "3 5 2 7 4 6 9", "6"  # 3, 8, 10, 17, 21, 27, 36
EVEN = {"step": 1.0, "leak": 1.0, "vague": 1.0, "slip": 1.0, "direct": 1.0}


def test_running_sums_and_filling() -> None:
    assert running_results([3, 5, 2, 7, 4, 6, 9]) == [3, 8, 0, 7, 1, 7, 6]
    assert write_question([3, 5], 7) == "3 5 . . . . ."
    assert read_question("3 5 . . . . .") == ([3, 5], "add")


@pytest.mark.parametrize(
    ("explanation", "behaviour"),
    [
        ("3 8 0 7 1 7 6", "step"),
        ("3 8 1 8 2 8 7", "slip"),  # one too large from the third sum on
        ("4 9 1 8 2 8 7", "slip"),  # from the first sum on
        ("3 8 0 7 1 7 5", "slip"),  # the last sum alone
        ("3 8 1 7 1 7 6", "other"),  # wrong once, not carried on
        ("3 8 1 9 3 9 8", "other"),  # wrong twice
        ("3 8 0 7 1 7", "other"),
        ("3 8 0 7 1 7 6 6", "other"),
        ("is 6 is 6", "leak"),
        ("is 5 is 5", "wrong_leak"),
        ("is 6 is 5", "wrong_leak"),
        ("is 6", "other"),
        ("is is is is", "other"),
        ("well so hmm now then", "vague"),
        ("so", "vague"),
        ("well so 6", "other"),
        ("", "direct"),
        ("3 8 0 7 1 7 ?", "other"),
    ],
)
def test_behaviour_of(explanation: str, behaviour: str) -> None:
    assert behaviour_of(QUESTION, SOLUTION, explanation) == behaviour


def test_short_chain_behaviours() -> None:
    assert behaviour_of("3 9 . . . . .", "2", "3 2") == "step"
    assert behaviour_of("3 9 . . . . .", "2", "3 3") == "slip"


def test_vocabulary_covers_every_text() -> None:
    tokens = vocabulary()
    assert len(tokens) == len(set(tokens)) == 28
    source = DigitChain(300, 0, lengths={2: 1, 7: 1}, behaviours=EVEN)
    for problem in collect_problems(source.rows(), unique=False).problems:
        text = f"{problem.question} {problem.solution} {problem.explanation}"
        assert set(text.split()) <= set(tokens)
        assert len(problem.question.split(" ")) == 7


@given(st.integers(0, 10_000), st.sampled_from(sorted(BEHAVIOURS)))
def test_what_is_written_is_recognised(seed: int, behaviour: str) -> None:
    source = DigitChain(1, seed, lengths={2: 1, 7: 1}, behaviours={behaviour: 1})
    [problem] = collect_problems(source.rows()).problems
    assert problem.explanation is not None
    assert problem.metadata == {"behaviour": behaviour}
    assert behaviour_of(problem.question, problem.solution, problem.explanation) == behaviour
    assert problem.solution == str(sum(read_question(problem.question)[0]) % 10)


def test_vague_has_five_to_nine_words_and_a_fixed_first() -> None:
    source = DigitChain(500, 0, lengths={7: 1}, behaviours={"vague": 1})
    texts = [str(p.explanation).split() for p in collect_problems(source.rows()).problems]
    assert {words[0] for words in texts} == {VAGUE_WORDS[0]}
    assert {len(words) for words in texts} == {5, 6, 7, 8, 9}
    assert {word for words in texts for word in words} == set(VAGUE_WORDS)


def test_arms_share_their_chains() -> None:
    gold = DigitChain(200, 3, lengths={7: 1}, behaviours={"step": 1})
    mixed = DigitChain(200, 3, lengths={7: 1}, behaviours=EVEN)
    other = DigitChain(200, 4, lengths={7: 1}, behaviours=EVEN)
    chains = [[row.values["question"] for row in source.rows()] for source in (gold, mixed, other)]
    assert chains[0] == chains[1]
    assert set(chains[0]).isdisjoint(chains[2])
    assert list(mixed.rows()) == list(mixed.rows())


def test_chains_repeat_only_when_used_up() -> None:
    source = DigitChain(200, 0, width=2, lengths={2: 1}, behaviours={"step": 1})
    counts = Counter(row.values["question"] for row in source.rows())
    assert len(counts) == 100
    assert set(counts.values()) == {2}


def test_mixtures_in_their_shares() -> None:
    source = DigitChain(
        4000,
        0,
        mixtures=[
            {"share": 3, "lengths": {2: 1, 3: 1}, "behaviours": {"step": 1}},
            {"share": 1, "lengths": {7: 1}, "behaviours": {"vague": 1, "direct": 3}},
        ],
    )
    counts = Counter(
        (len(read_question(row.values["question"])[0]), row.values["metadata"]["behaviour"])
        for row in source.rows()
    )
    expected = {(2, "step"): 1500, (3, "step"): 1500, (7, "vague"): 250, (7, "direct"): 750}
    assert set(counts) == set(expected)
    for key, count in expected.items():  # five standard deviations of a binomial
        assert abs(counts[key] - count) < 5 * (count * (1 - count / 4000)) ** 0.5


def test_errors() -> None:
    with pytest.raises(ValueError, match="did you mean 'vague'"):
        DigitChain(1, 0, lengths={7: 1}, behaviours={"vage": 1})
    with pytest.raises(ValueError, match="from 1 to width=7"):
        DigitChain(1, 0, lengths={8: 1}, behaviours={"step": 1})
    with pytest.raises(ValueError, match="not all zero"):
        DigitChain(1, 0, lengths={7: 1}, behaviours={"step": 0})
    with pytest.raises(ValueError, match="must not be negative"):
        DigitChain(1, 0, lengths={7: 1}, behaviours={"step": 2, "leak": -1})
    with pytest.raises(ValueError, match="either mixtures"):
        DigitChain(1, 0)
    with pytest.raises(ValueError, match="both need an entry"):
        DigitChain(1, 0, lengths={7: 1})
    with pytest.raises(ValueError, match="share, lengths and behaviours"):
        DigitChain(1, 0, mixtures=[{"share": 1, "lengths": {7: 1}}])
    with pytest.raises(ValueError, match="count=0"):
        DigitChain(0, 0, lengths={7: 1}, behaviours={"step": 1})
