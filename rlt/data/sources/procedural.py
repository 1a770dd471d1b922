"""Problems of reasoning-gym's procedural tasks, by task name.

A task with worked explanations (`gsm_symbolic`, in `metadata.answer_cot`) gives them as
explanations, without their last line `#### N`. A few of gsm_symbolic's contain a wrong line
("48=48 emails") before a right result; they are left as they are. For `chain_sum` the running
totals are written out (`rlt.data.sources.chain_sum`).
Used by `rlt stage=teacher_rl data=gsm_symbolic`, any other task with data=reasoning_gym
data.source.task=<name>.
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
    """Problems of one task.

    A problem's metadata holds `task` and `entry`, reasoning-gym's record in JSON form; its
    verifier wants `decode_entry(entry)`.

    Args:
        task: name of the task in reasoning-gym.
        size: how many problems.
        seed: chooses the problems; see `generator_seed`.
        options: the task's own settings (difficulty), e.g. {min_terms: 2}; None: its defaults.
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
        with contextlib.redirect_stdout(io.StringIO()):  # some tasks print while they are made
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
    """Far-apart seeds for neighbouring ones.

    reasoning-gym makes problem i from `seed + i`, so 1,000 problems each of seeds 0 and 1 would
    be 999 times the same.
    """
    return int(content_hash("reasoning-gym", str(seed)), 16) % 2**31


def worked_explanation(task: str, metadata: Mapping[str, Any]) -> str | None:
    """The task's own worked explanation without its last line `#### N`, or one written here."""
    if task == "chain_sum":
        return running_totals(metadata["expression"])
    answer_cot = metadata.get("answer_cot")
    return None if answer_cot is None else FINAL_LINE.sub("", answer_cot)


def encode_entry(value: Any) -> Any:
    """A JSON-serialisable copy; tuples, which verifiers tell from lists, and fractions survive."""
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
    """The inverse of `encode_entry`, but for dictionary keys, which are text now."""
    if isinstance(value, list):
        return [decode_entry(each) for each in value]
    if isinstance(value, Mapping):
        if set(value) == {TUPLE_KEY}:
            return tuple(decode_entry(each) for each in value[TUPLE_KEY])
        if set(value) == {FRACTION_KEY}:
            return Fraction(value[FRACTION_KEY])
        return {key: decode_entry(each) for key, each in value.items()}
    return value
