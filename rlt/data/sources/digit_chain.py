"""Digit chains: a task on which models of 0.1 M parameters show the effect of teaching in minutes.

A question is a chain of digits, and its solution is their sum modulo 10: "3 5 2 7 4 6 9" -> "6".
Every digit, tag and word is one token (`rlt.llm.digit_words`). Shorter chains are filled up to
`width` with ".", so that every prompt has the same length. A single step (digit + digit modulo 10)
is a table of a hundred facts. Such a model cannot compute all steps at once without writing them
down.

`rlt.data.sources.digit_chain_text` writes and classifies questions and explanations.

Used by `rlt stage=pipeline experiment=quickstart`, `rlt stage=pretrain data=digit_chain_pretrain`.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlt.config.suggestions import did_you_mean
from rlt.data.problem import content_hash
from rlt.data.rows import RawRow
from rlt.data.sources.digit_chain_text import BEHAVIOURS, running_results, write_question
from rlt.llm.digit_words import MODULUS, SIGNS


class DigitChain:
    """A source of digit chains with explanations.

    The chains depend on seed, lengths and count, but not on the behaviours. Therefore arms of an
    experiment can differ in their explanations alone. A chain is repeated only after all chains of
    its length and operation have been used. The metadata of a problem holds its `behaviour`.

    Args:
        count: number of problems.
        seed: seed of the chains and the explanations.
        width: number of digits and fillers of a question, which is the length of the longest chain.
        lengths: weight of each number of digits.
        behaviours: weight of each behaviour: step, leak, vague, slip, direct.
        mixtures: a list of {share, lengths, behaviours} that replaces `lengths` and `behaviours`.
        operations: weight of each operation: add, subtract; None is add alone.
        signs: whether each question begins with the sign of its operation.

    Raises:
        ValueError: an option is out of range, or options do not fit together.
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
        """Yield all problems."""
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
        """Return what identifies the data, including a `fingerprint`, for the manifest."""
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
    """Draw a chain that is not in `used`. Once all chains are used, `used` is emptied."""
    if len(used) == MODULUS**length:
        used.clear()
    while True:
        digits = tuple(rng.randrange(MODULUS) for _ in range(length))
        if digits not in used:
            used.add(digits)
            return digits


def _check_operations(operations: Mapping[str, float], signs: bool) -> dict[str, float]:
    """Return the operations with a weight above 0, with their weights."""
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
            f"data.source.mixtures has an entry with the keys {sorted(mixture)}; each entry needs "
            "share, lengths and behaviours"
        )
    if not mixture["lengths"] or not mixture["behaviours"]:
        raise ValueError(
            f"data.source: lengths={mixture['lengths']}, behaviours={mixture['behaviours']}; "
            "both need an entry, for example lengths: {7: 1}, behaviours: {step: 1}"
        )
    lengths: dict[int, float] = {}
    for key, weight in mixture["lengths"].items():
        length = (
            int(key) if isinstance(key, str) and key.isdecimal() else key
        )  # the override +lengths.5=1 has a text key
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
