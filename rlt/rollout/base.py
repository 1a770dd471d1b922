"""What every rollout engine takes and returns.

An engine is handed the live model at each call. One that samples in this process runs it; one that
keeps weights of its own (a server) copies them over when they have changed. Callers see no
difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    Attributes:
        ids: sampled token ids, with the tokens of the stop string or the EOS they ended in.
        log_probs: their log-probs at the sampling temperature, before top-p, top-k or min-p.
        finish: `stop` (stop string), `eos`, or `length` (cut at `max_new_tokens`).
    """

    ids: list[int]
    log_probs: list[float]
    finish: str


class Rollout(Protocol):
    """A rollout engine."""

    temperature: float
    max_new_tokens: int

    def sample(
        self,
        model: nn.Module,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        n: int,
        stop: str,
    ) -> list[list[Completion]]:
        """Sample `n` completions of every prompt, in the prompts' order."""
        ...
