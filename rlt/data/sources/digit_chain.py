"""Digit chains: a setting in which teaching shows within minutes, with a model of 0.1 M parameters.

A question is a chain of digits, its solution their sum modulo 10: "3 5 2 7 4 6 9" -> "6". One
token per digit, tag and word, in `vocabulary()`; shorter chains are filled up to `width` with ".",
so that every prompt has the same length. One step (digit + digit modulo 10) is a table of a hundred
facts; all steps at once, without working, are out of reach. An explanation behaves in one of
these ways, told apart exactly by `behaviour_of`:

    step    all running sums right: "3 8 0 7 1 7 6"    leak    the solution told: "is 6 is 6"
    slip    one running sum wrong and carried on       vague   five to nine meaningless words
    direct  nothing at all: ""

Where there is more than one operation, a question begins with its sign ("- 3 5 2" -> "6"), and
running differences take the place of running sums.

A vague explanation always begins with the same word: with eight first words, each would be too
rare to be the likeliest continuation, and greedy decoding would hide vague text.
Used by `rlt stage=pipeline experiment=quickstart`, `rlt stage=pretrain data=digit_chain_pretrain`.
"""

import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rlt.config.suggestions import did_you_mean
from rlt.data.problem import content_hash
from rlt.data.rows import RawRow
from rlt.llm.digit_words import DIGITS, FILLER, LEAK_WORD, MODULUS, SIGNS, VAGUE_WORDS

VAGUE_LENGTHS = (5, 9)  # fewest and most words


def running_results(digits: Sequence[int], operation: str = "add") -> list[int]:
    """Sum (or difference) modulo 10 after each digit; the last one is the solution."""
    factor = {"add": 1, "subtract": -1}[operation]
    return [total % MODULUS for total in itertools.accumulate(digits, lambda a, b: a + factor * b)]


def write_question(digits: Sequence[int], width: int, sign: str | None = None) -> str:
    start = [] if sign is None else [sign]
    return " ".join([*start, *map(str, digits), *[FILLER] * (width - len(digits))])


def read_question(question: str) -> tuple[list[int], str]:
    """The digits of a question and its operation; a question without a sign adds."""
    tokens = [token for token in question.split() if token != FILLER]
    for operation, sign in SIGNS.items():
        if tokens and tokens[0] == sign:
            return [int(token) for token in tokens[1:]], operation
    return [int(token) for token in tokens], "add"


def explain_step(results: Sequence[int], rng: random.Random) -> str:
    return " ".join(map(str, results))


def explain_slip(results: Sequence[int], rng: random.Random) -> str:
    """From a random place on, all running results are off by the same amount."""
    place, error = rng.randrange(len(results)), rng.randrange(1, MODULUS)
    slipped = [(result + error) % MODULUS for result in results[place:]]
    return " ".join(map(str, [*results[:place], *slipped]))


def explain_leak(results: Sequence[int], rng: random.Random) -> str:
    return f"{LEAK_WORD} {results[-1]} {LEAK_WORD} {results[-1]}"


def explain_vague(results: Sequence[int], rng: random.Random) -> str:
    n_words = rng.randint(*VAGUE_LENGTHS)
    return " ".join([VAGUE_WORDS[0], *rng.choices(VAGUE_WORDS, k=n_words - 1)])


def explain_direct(results: Sequence[int], rng: random.Random) -> str:
    return ""


BEHAVIOURS: dict[str, Callable[[Sequence[int], random.Random], str]] = {
    "step": explain_step,
    "leak": explain_leak,
    "vague": explain_vague,
    "slip": explain_slip,
    "direct": explain_direct,
}


def behaviour_of(question: str, solution: str, explanation: str) -> str:
    """What an explanation does: a name of `BEHAVIOURS`, `wrong_leak` or `other`.

    A leak that tells anything but the solution twice is a wrong leak; a model's vague text may
    have any number of words and begin with any of them.
    """
    tokens = explanation.split()
    if not tokens:
        return "direct"
    if all(token in VAGUE_WORDS for token in tokens):
        return "vague"
    if len(tokens) == 4 and tokens[0] == tokens[2] == LEAK_WORD:
        told = {tokens[1], tokens[3]}
        return "leak" if told == {solution} else "wrong_leak" if told <= set(DIGITS) else "other"
    results = running_results(*read_question(question))
    if len(tokens) != len(results) or not set(tokens) <= set(DIGITS):
        return "other"
    errors = [(int(token) - true) % MODULUS for token, true in zip(tokens, results, strict=True)]
    changes = [after for before, after in itertools.pairwise([0, *errors]) if after != before]
    if not changes:
        return "step"
    return "slip" if len(changes) == 1 else "other"


class ChainBehaviour:
    """`behaviour_of` as the `behaviour` of a data node (see `rlt.data.dataset.ProblemData`)."""

    names = (*BEHAVIOURS, "wrong_leak", "other")
    good = ("step",)

    def __call__(self, question: str, solution: str, explanation: str, closed: bool = True) -> str:
        return behaviour_of(question, solution, explanation)


class DigitChain:
    """Digit chains with explanations.

    The same seed, lengths and count give the same chains whatever their behaviours, so arms of
    an experiment differ in their explanations alone. A chain repeats only when all chains of
    its length and operation have been used. Metadata: `behaviour`.

    Args:
        count: how many problems.
        seed: of the chains and the explanations.
        width: digits and fillers of a question; the longest chain.
        lengths: number of digits -> weight.
        behaviours: step, leak, vague, slip, direct -> weight.
        mixtures: instead of lengths and behaviours, a list of {share, lengths, behaviours}.
        operations: add, subtract -> weight.
        signs: begin each question with its operation's sign.
    """

    def __init__(
        self,
        count: int,
        seed: int,
        width: int = 7,
        lengths: Mapping[int, float] | None = None,
        behaviours: Mapping[str, float] | None = None,
        mixtures: Sequence[Mapping[str, Any]] | None = None,
        operations: Mapping[str, float] | None = None,
        signs: bool = False,
    ) -> None:
        if count < 1:
            raise ValueError(f"data.source.count={count}; it must be at least 1")
        if (mixtures is None) == (lengths is None and behaviours is None):
            raise ValueError(
                f"data.source.mixtures={mixtures}, lengths={lengths}, behaviours={behaviours}; "
                "set either mixtures, or lengths and behaviours, and the other to null"
            )
        if mixtures is None:
            mixtures = [{"share": 1, "lengths": lengths, "behaviours": behaviours}]
        self.count = count
        self.seed = seed
        self.width = width
        self.signs = signs
        self.mixtures = [_check_mixture(mixture, width) for mixture in mixtures]
        self.operations = _check_operations(operations or {"add": 1.0}, signs)
        self.shares = _check_weights({i: m["share"] for i, m in enumerate(mixtures)}, "share")

    def rows(self) -> Iterator[RawRow]:
        chains = [[self.shares, *[mixture["lengths"] for mixture in self.mixtures]], self.width]
        chain_rng = random.Random(f"chains {self.seed} {chains}")
        used: dict[tuple[str, int], set[tuple[int, ...]]] = {}
        for number in range(1, self.count + 1):
            mixture = self.mixtures[_draw(self.shares, chain_rng)]
            length = _draw(mixture["lengths"], chain_rng)
            operation = next(iter(self.operations))
            if len(self.operations) > 1:
                operation = _draw(self.operations, chain_rng)
            digits = _draw_chain(length, used.setdefault((operation, length), set()), chain_rng)
            results = running_results(digits, operation)
            rng = random.Random(f"explanation {self.seed} {number}")
            behaviour = _draw(mixture["behaviours"], rng)
            values = {
                "question": write_question(
                    digits, self.width, SIGNS[operation] if self.signs else None
                ),
                "solution": str(results[-1]),
                "explanation": BEHAVIOURS[behaviour](results, rng),
                "metadata": {"behaviour": behaviour},
            }
            yield RawRow("digit_chain", number, values)

    def describe(self) -> dict[str, Any]:
        about = {
            "kind": "DigitChain",
            "count": self.count,
            "seed": self.seed,
            "width": self.width,
            "operations": self.operations,
            "signs": self.signs,
            "mixtures": [
                {
                    "share": share,
                    "lengths": {str(length): w for length, w in mixture["lengths"].items()},
                    "behaviours": mixture["behaviours"],
                }
                for share, mixture in zip(self.shares.values(), self.mixtures, strict=True)
            ],
        }
        return {**about, "fingerprint": content_hash(json.dumps(about, sort_keys=True))}


def _draw(weights: Mapping[Any, float], rng: random.Random) -> Any:
    return rng.choices(list(weights), list(weights.values()))[0]


def _draw_chain(length: int, used: set[tuple[int, ...]], rng: random.Random) -> tuple[int, ...]:
    """A chain not drawn before; once all have been, they may all come again."""
    if len(used) == MODULUS**length:
        used.clear()
    while True:
        digits = tuple(rng.randrange(MODULUS) for _ in range(length))
        if digits not in used:
            used.add(digits)
            return digits


def _check_operations(operations: Mapping[str, float], signs: bool) -> dict[str, float]:
    """Those of a weight above 0."""
    for operation in operations:
        if operation not in SIGNS:
            raise ValueError(
                f"data.source.operations has {operation!r}; it must be one of {', '.join(SIGNS)}"
                f"{did_you_mean(str(operation), SIGNS)}"
            )
    weights = {k: w for k, w in _check_weights(operations, "operations").items() if w > 0}
    if not signs and set(weights) != {"add"}:
        raise ValueError(
            "data.source.signs=false: a question without a sign adds; set data.source.signs=true, "
            "and make_tokenizer.signs=true of each model"
        )
    return weights


def _check_mixture(mixture: Mapping[str, Any], width: int) -> dict[str, Any]:
    if set(mixture) != {"share", "lengths", "behaviours"}:
        raise ValueError(
            f"data.source.mixtures has an entry with the keys {sorted(mixture)}; each has share, "
            "lengths and behaviours"
        )
    if not mixture["lengths"] or not mixture["behaviours"]:
        raise ValueError(
            f"data.source: lengths={mixture['lengths']}, behaviours={mixture['behaviours']}; "
            "both need an entry, e.g. lengths: {7: 1}, behaviours: {step: 1}"
        )
    lengths: dict[int, float] = {}
    for key, weight in mixture["lengths"].items():
        length = int(key) if isinstance(key, str) and key.isdecimal() else key  # +lengths.5=1
        if not isinstance(length, int) or not 1 <= length <= width:
            raise ValueError(
                f"data.source.lengths has {key!r}; a length is a whole number from 1 to "
                f"width={width}; raise data.source.width for longer chains"
            )
        lengths[length] = weight
    for behaviour in mixture["behaviours"]:
        if behaviour not in BEHAVIOURS:
            raise ValueError(
                f"data.source.behaviours has {behaviour!r}; it must be one of "
                f"{', '.join(BEHAVIOURS)}{did_you_mean(str(behaviour), BEHAVIOURS)}"
            )
    return {
        "lengths": _check_weights(lengths, "lengths"),
        "behaviours": _check_weights(mixture["behaviours"], "behaviours"),
    }


def _check_weights(weights: Mapping[Any, float], name: str) -> dict[Any, float]:
    if any(weight < 0 for weight in weights.values()) or sum(weights.values()) <= 0:
        raise ValueError(
            f"data.source: the weights of {name} are {dict(weights)}; they must not be negative "
            "and not all zero"
        )
    return {key: float(weight) for key, weight in sorted(weights.items())}
