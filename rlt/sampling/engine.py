"""What every rollout engine takes and returns.

An engine is handed the live model at each call. One that samples in this process runs it; one that
keeps weights of its own (a server) copies them over when they have changed. Callers see no
difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    Attributes:
        ids: sampled token ids, with the tokens of the stop string or the EOS they ended in.
        log_probs: their log-probs at the sampling temperature, before top-p, top-k or min-p; empty
            if the engine computes otherwise than a forward pass of the model itself.
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


def known_log_probs(model: nn.Module, completions: Sequence[Completion]) -> list[Tensor] | None:
    """Log-probs `[T]` as they were when each completion was sampled, in place of another forward.

    None unless they are those of a forward pass to float32 rounding: in lower precision, decoding
    token by token rounds otherwise than a whole sequence does.
    """
    parameter = next(model.parameters())
    if parameter.dtype != torch.float32 or torch.is_autocast_enabled(parameter.device.type):
        return None
    if any(len(c.log_probs) != len(c.ids) for c in completions):
        return None
    return [torch.tensor(c.log_probs, device=parameter.device) for c in completions]
