"""Rollouts in this process, on the model's own weights, token by token.

Log-probs are read from the raw logits at the sampling temperature, before any truncation, so they
are those that the training forward gives for the same tokens. A row stops at the end of its turn
or as soon as its decoded tail holds the stop string, wherever token borders fall.

Against transformers' `generate`: a group's prompt runs once and is kept once, keys and values are
written in place (`rlt.sampling.shared_prefix`), and rows that have ended leave the batch.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rlt.llm.batching import micro_batches
from rlt.llm.finite_checks import NotFiniteError
from rlt.llm.lm_head import logits_of
from rlt.llm.token_budget import TokenBudget
from rlt.llm.tokenizers import turn_end_ids
from rlt.sampling.engine import Completion
from rlt.sampling.shared_prefix import RunningRows

_KEPT_SHARE = 0.75  # rows leave the batch, at the cost of copying its cache, once no more are left


class HFRollout:
    """Samples from a transformers model.

    Args:
        temperature: sampling temperature; 0 decodes greedily (log-probs are then at 1).
        max_new_tokens: completions are cut here.
        top_p, top_k, min_p: truncation of the distribution; 1, 0 and 0 switch them off.
        token_budget: rows × (prompt + new tokens) generated at once, to begin with: too many for
            the memory are lowered, and what is sampled is what the lower budget samples.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self,
        temperature: float = 0.7,
        max_new_tokens: int = 256,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        token_budget: int = 65536,
    ) -> None:
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
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.token_budget = TokenBudget(token_budget, "hardware.generation_token_budget")
        self._truncate = LogitsProcessorList()
        if top_k:
            self._truncate.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self._truncate.append(TopPLogitsWarper(top_p))
        if min_p:
            self._truncate.append(MinPLogitsWarper(min_p))

    @torch.no_grad()
    def sample(
        self,
        model: nn.Module,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        n: int,
        stop: str,
    ) -> list[list[Completion]]:
        """Sample `n` completions of every prompt (see `Rollout.sample`)."""
        rows = [p for p in range(len(prompts)) for _ in range(n)]
        lengths = [len(prompts[p]) + self.max_new_tokens for p in rows]
        cut = functools.partial(micro_batches, lengths)

        def generate(tokens: int) -> dict[int, Completion]:
            made: dict[int, Completion] = {}
            for indices in cut(tokens):
                batch = self._generate(model, tokenizer, [prompts[rows[i]] for i in indices], stop)
                made.update(zip(indices, batch, strict=True))
            return made

        with _weights_cast_once():
            made = self.token_budget.fit(generate, cut)
        done = [made[index] for index in range(len(rows))]
        return [done[p * n : (p + 1) * n] for p in range(len(prompts))]

    def _generate(
        self, model: Any, tokenizer: Any, prompts: list[Sequence[int]], stop: str
    ) -> list[Completion]:
        ends = _Ends(tokenizer, stop)
        rows = [_Row() for _ in prompts]  # of the batch; those that ended leave it now and then
        written = list(rows)
        running = RunningRows(model, prompts, tokenizer.pad_token_id)
        for length in range(1, self.max_new_tokens + 1):
            logits_BV = logits_of(model, running.hidden_BD, self.temperature or 1.0)
            tokens_B, log_probs_B = self._draw(logits_BV)
            for row, token, log_prob in zip(
                rows, tokens_B.tolist(), log_probs_B.tolist(), strict=True
            ):
                if row.finish is None:
                    row.ids.append(token)
                    row.log_probs.append(log_prob)
                    row.finish = ends.reason(row.ids)
            going = [b for b, row in enumerate(rows) if row.finish is None]
            if not going or length == self.max_new_tokens:
                break
            if running.can_drop and len(going) <= _KEPT_SHARE * len(rows):
                kept_B = torch.tensor(going, device=tokens_B.device)
                rows = [rows[b] for b in going]
                tokens_B = tokens_B[kept_B]
                running.keep(kept_B)
            running.append(tokens_B)
        return [Completion(row.ids, row.log_probs, row.finish or "length") for row in written]

    def _draw(self, logits_BV: Tensor) -> tuple[Tensor, Tensor]:
        """A token for each row, and its log-prob before truncation.

        Raises:
            NotFiniteError: a row's logits are NaN or infinite.
        """
        log_probs_BV = logits_BV.log_softmax(-1)
        if log_probs_BV[:, 0].isnan().any():
            raise NotFiniteError("the model's logits are NaN or infinite, nothing can be sampled")
        no_ids: Any = None  # none of these looks at what was written
        truncated_BV = self._truncate(no_ids, log_probs_BV)
        if self.temperature == 0:
            tokens_B = truncated_BV.argmax(-1)
        else:
            # The inverse of the cumulative distribution: one random number a row, where
            # `multinomial` draws one for every word of the vocabulary.
            dtype = torch.float32 if logits_BV.device.type == "mps" else torch.float64
            cumulative_BV = truncated_BV.softmax(-1).cumsum(-1, dtype=dtype)
            total_B1 = cumulative_BV[:, -1:]
            below_B1 = total_B1.nextafter(torch.zeros_like(total_B1))  # the product may round up
            drawn_B1 = (torch.rand_like(total_B1) * total_B1).minimum(below_B1)
            tokens_B = torch.searchsorted(cumulative_BV, drawn_B1, right=True)[:, 0]
        return tokens_B, log_probs_BV.gather(-1, tokens_B[:, None])[:, 0]


@contextlib.contextmanager
def _weights_cast_once() -> Iterator[None]:
    """Under autocast, keep the weights as cast: Lightning has them cast anew for every token."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(True)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
        torch.clear_autocast_cache()


@dataclass
class _Row:
    """What a row has written so far; `finish` is None while it goes on."""

    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish: str | None = None


class _Ends:
    """Tells whether a row has just ended, and why."""

    def __init__(self, tokenizer: Any, stop: str) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.turn_ends = turn_end_ids(tokenizer)
        ids = tokenizer(stop, add_special_tokens=False)["input_ids"]
        # A tag that is one token of its own is compared by id; any other by its characters.
        self.stop_id = ids[0] if len(ids) == 1 else None
        self.tail_tokens = len(stop.encode()) + 2  # at least one byte of the tag a token

    def reason(self, ids: list[int]) -> str | None:
        if ids[-1] == self.stop_id:
            return "stop"
        if self.stop_id is None:
            tail = self.tokenizer.decode(
                ids[-self.tail_tokens :], clean_up_tokenization_spaces=False
            )
            if self.stop in tail:
                return "stop"
        return "eos" if ids[-1] in self.turn_ends else None
