"""The interface of every rollout engine.

An engine receives the current model at each call. An engine that samples in this process runs that
model. An engine with weights of its own, such as a server, would copy the weights when they have
changed. Callers need not know which kind they use.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    Attributes:
        ids: sampled token ids, including those of the stop string or the EOS at their end.
        log_probs: log-probs of the tokens in nats, at the sampling temperature and before top-p,
            top-k or min-p, as the engine computed them. Empty if it does not tell.
        finish: why the completion ended: `stop` (stop string), `eos` (end of the turn) or `length`
            (cut at `max_new_tokens`).
        exact: whether the engine computes as the model's own layers do. If not, its log-probs
            differ from the model's by more than the order of additions.
        version: name of the weights that an engine with weights of its own has sampled it from.
    """

    ids: list[int]
    log_probs: list[float]
    finish: str
    exact: bool = True
    version: str = ""


class Rollout(Protocol):
    """A rollout engine.

    Attributes:
        temperature: sampling temperature; 0 is greedy decoding.
        max_new_tokens: largest number of tokens of a completion.
    """

    temperature: float
    max_new_tokens: int

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Bring an engine with weights of its own up to date, before the model samples.

        It is called whenever the model's weights may have changed, by all ranks together.

        Args:
            model: the model that samples next.
            tokenizer: its tokenizer.
        """
        ...

    def sample(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        n: int,
        stop: str,
        seeds: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """Sample `n` completions of every prompt.

        Args:
            model: the model that samples.
            tokenizer: its tokenizer.
            prompts: token ids of each prompt.
            n: number of completions for each prompt.
            stop: a completion ends as soon as it contains this string.
            seeds: one for each prompt: its completions are drawn by random numbers of their own, so
                that they do not depend on what else is sampled. None draws seeds (`draw_seeds`).

        Returns:
            One list of `n` completions for each prompt, in the order of the prompts.
        """
        ...


def require_sampling(
    temperature: float, max_new_tokens: int, top_p: float, top_k: int, min_p: float
) -> None:
    """Raises ValueError when a setting of sampling is out of range."""
    if temperature < 0:
        raise ValueError(f"rollout.temperature={temperature} must be 0 (greedy) or more")
    if max_new_tokens < 1:
        raise ValueError(f"rollout.max_new_tokens={max_new_tokens} must be at least 1")
    if not 0 < top_p <= 1:
        raise ValueError(f"rollout.top_p={top_p} must lie in (0, 1]; 1 switches it off")
    if top_k < 0:
        raise ValueError(f"rollout.top_k={top_k} must be 0 (off) or more")
    if not 0 <= min_p < 1:
        raise ValueError(f"rollout.min_p={min_p} must lie in [0, 1); 0 switches it off")


def draw_seeds(count: int) -> list[int]:
    """Seeds from torch's global random numbers, for `Rollout.sample`."""
    drawn: list[int] = torch.randint(2**63 - 1, (count,)).tolist()
    return drawn


def known_log_probs(model: nn.Module, completions: Sequence[Completion]) -> list[Tensor] | None:
    """Return the log-probs that were computed while sampling, to save another forward pass.

    They are usable only if a forward pass over the whole sequence would give the same values up to
    float32 rounding. In lower precision, decoding token by token is rounded differently.

    Args:
        model: the model that has sampled the completions, with unchanged weights.
        completions: the completions.

    Returns:
        The log-probs `[T]` of each completion, or None if they are not usable.
    """
    parameter = next(model.parameters())
    if parameter.dtype != torch.float32 or torch.is_autocast_enabled(parameter.device.type):
        return None
    if any(not c.exact or len(c.log_probs) != len(c.ids) for c in completions):
        return None
    return [torch.tensor(c.log_probs, device=parameter.device) for c in completions]
