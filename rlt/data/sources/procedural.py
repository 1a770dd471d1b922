"""Problems of the procedural tasks of reasoning-gym, by task name.

If a task has worked explanations (`gsm_symbolic` in `metadata.answer_cot`), they become the
explanations, without their last line `#### N`. A few explanations of gsm_symbolic contain a wrong
line ("48=48 emails") before a right result. They are left as they are. For `chain_sum`, the
explanations are running totals (`rlt.data.sources.chain_sum`).

Used by `rlt stage=teacher_rl data=gsm_symbolic`, and for any other task by
`data=reasoning_gym data.source.task=<name>`.
"""

import contextlib
import dataclasses
import importlib.metadata
import io
import json
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from rlt.config.suggestions import did_you_mean
from rlt.data.problem import content_hash
from rlt.data.rows import RawRow
from rlt.data.sources.chain_sum import running_totals

FINAL_LINE = re.compile(r"\s*^####[^\n]*\s*\Z", re.MULTILINE)
TUPLE_KEY = "__tuple__"
FRACTION_KEY = "__fraction__"


class ReasoningGym:
    """A source of problems of one task.

    The metadata of a problem holds `task` and `entry`, which is the record of reasoning-gym in JSON
    form. The verifier of the task takes `decode_entry(entry)`.

    Args:
        task: name of the task in reasoning-gym.
        size: number of problems.
        seed: seed of the problems (see `generator_seed`).
        options: settings of the task, such as {min_terms: 2}; None takes its defaults.

    Raises:
        ValueError: there is no such task or option, or `size` is less than 1.
    """

    def __init__(
        self, task: str, size: int, seed: int, options: Mapping[str, Any] | None = None
    ) -> None:
        if task not in DATASETS:
            raise ValueError(
                f"data.source.task={task!r}: reasoning-gym has no such task"
                f"{did_you_mean(task, DATASETS)}; it has {len(DATASETS)}, see "
                "`python -c 'import reasoning_gym.factory as f; print(*f.DATASETS)'`"
            )
        if size < 1:
            raise ValueError(f"data.source.size={size}; it must be at least 1")
        self.task = task
        self.size = size
        self.seed = seed
        self.options = dict(options or {})
        self._check_options()

    def _check_options(self) -> None:
        known = {each.name for each in dataclasses.fields(DATASETS[self.task][1])}
        for name in self.options:
            if name not in known - {"size", "seed"}:
                raise ValueError(
                    f"data.source.options.{name}: the task {self.task} has no such option"
                    f"{did_you_mean(name, known)}; it has {', '.join(sorted(known))} "
                    "(size and seed are set beside the options)"
                )

    def rows(self) -> Iterator[RawRow]:
        """Yield all problems.

        Raises:
            ValueError: reasoning-gym refuses the size or the options.
        """
        with contextlib.redirect_stdout(io.StringIO()):  # some tasks print messages
            try:
                entries = reasoning_gym.create_dataset(
                    self.task, size=self.size, seed=generator_seed(self.seed), **self.options
                )
            except (AssertionError, TypeError, ValueError) as error:
                raise ValueError(
                    f"reasoning-gym's {self.task} refuses size={self.size} with the options "
                    f"{self.options}: {error}"
                ) from error
        for number in range(1, self.size + 1):
            with contextlib.redirect_stdout(io.StringIO()):
                entry = entries[number - 1]
            values = {
                "question": entry["question"],
                "solution": entry["answer"],
                "explanation": worked_explanation(self.task, entry["metadata"]),
                "metadata": {"task": self.task, "entry": encode_entry(entry)},
            }
            yield RawRow(f"reasoning_gym:{self.task}", number, values)

    def describe(self) -> dict[str, Any]:
        """Return what identifies the data, including a `fingerprint`, for the manifest."""
        about = {
            "kind": "ReasoningGym",
            "task": self.task,
            "size": self.size,
            "seed": self.seed,
            "options": self.options,
            "version": importlib.metadata.version("reasoning_gym"),
        }
        return {**about, "fingerprint": content_hash(json.dumps(about, sort_keys=True))}


def generator_seed(seed: int) -> int:
    """Return the seed for reasoning-gym, which is far from those of neighbouring seeds.

    reasoning-gym makes problem i from `seed + i`, so 999 of 1,000 problems of seed 0 would also be
    problems of seed 1.
    """
    return int(content_hash("reasoning-gym", str(seed)), 16) % 2**31


def worked_explanation(task: str, metadata: Mapping[str, Any]) -> str | None:
    """Return the worked explanation of a problem, or None if its task has none.

    Args:
        task: name of the task.
        metadata: the metadata of reasoning-gym's record.
    """
    if task == "chain_sum":
        return running_totals(metadata["expression"])
    answer_cot = metadata.get("answer_cot")
    return None if answer_cot is None else FINAL_LINE.sub("", answer_cot)


def encode_entry(value: Any) -> Any:
    """Return a JSON-serialisable copy of a record of reasoning-gym.

    Tuples and fractions are encoded, because verifiers distinguish tuples from lists.

    Raises:
        TypeError: the record holds a value of another type.
    """
    if isinstance(value, tuple):
        return {TUPLE_KEY: [encode_entry(each) for each in value]}
    if isinstance(value, Fraction):
        return {FRACTION_KEY: str(value)}
    if isinstance(value, list):
        return [encode_entry(each) for each in value]
    if isinstance(value, Mapping):
        return {str(key): encode_entry(each) for key, each in value.items()}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"reasoning-gym entry holds a {type(value).__name__}, not JSON: {value!r:.80}")


def decode_entry(value: Any) -> Any:
    """Undo `encode_entry`, except that all keys of dictionaries stay text."""
    if isinstance(value, list):
        return [decode_entry(each) for each in value]
    if isinstance(value, Mapping):
        if set(value) == {TUPLE_KEY}:
            return tuple(decode_entry(each) for each in value[TUPLE_KEY])
        if set(value) == {FRACTION_KEY}:
            return Fraction(value[FRACTION_KEY])
        return {key: decode_entry(each) for key, each in value.items()}
    return value
