"""A rollout engine that samples in this process from a transformers model, token by token.

Log-probs are computed from the logits at the sampling temperature, before any truncation.
Therefore they are equal to those that the training forward pass gives for the same tokens. A row
ends at the end of its turn, or as soon as its decoded last tokens contain the stop string. The stop
string need not begin or end where a token does.

The differences to transformers' `generate`: a prompt runs once and is stored once for all of its
completions, keys and values are written in place (`rlt.sampling.shared_prefix`), and rows that have
ended are removed from the batch.

Capital letters in names are dimensions: B rows, V vocabulary, D hidden size.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rlt.llm.batching import micro_batches
from rlt.llm.finite_checks import NotFiniteError
from rlt.llm.lm_head import logits_of
from rlt.llm.token_budget import TokenBudget
from rlt.llm.tokenizers import turn_end_ids
from rlt.sampling.engine import Completion, draw_seeds, require_sampling
from rlt.sampling.linear_copies import linear_copies
from rlt.sampling.shared_prefix import RunningRows

# Removing ended rows copies the cache of the batch. It is done once at most this fraction of the
# rows is unfinished.
_UNFINISHED_FRACTION = 0.75
_LINEAR_DTYPES = ("auto", "float32", "bfloat16", "float16")


class HFRollout:
    """Samples from a transformers model.

    Args:
        temperature: sampling temperature. 0 decodes greedily, and log-probs are then taken at
            temperature 1.
        max_new_tokens: largest number of tokens of a completion.
        top_p: keep the most likely tokens whose probabilities add up to this value; 1 keeps all.
        top_k: keep this number of most likely tokens; 0 keeps all.
        min_p: keep tokens with at least this fraction of the highest probability; 0 keeps all.
        token_budget: rows × (longest prompt + new tokens) that are generated at once. It is
            lowered if memory runs out (`rlt.llm.token_budget`).
        linear_dtype: linear layers sample from copies of their weights, with an adapter merged in
            (`rlt.sampling.linear_copies`): `float32`, `bfloat16` or `float16` is the type of the
            copies. None makes no copies. `auto` makes them in float32 where a model in float32 is
            on a CPU.

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
        linear_dtype: str | None = "auto",
    ) -> None:
        require_sampling(temperature, max_new_tokens, top_p, top_k, min_p)
        if linear_dtype not in (None, *_LINEAR_DTYPES):
            raise ValueError(
                f"rollout.linear_dtype={linear_dtype} must be null or one of "
                f"{', '.join(_LINEAR_DTYPES)}"
            )
        self.linear_dtype = linear_dtype
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

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Nothing: the model itself samples."""

    @torch.no_grad()
    def sample(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        n: int,
        stop: str,
        seeds: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """Sample `n` completions of every prompt (see `Rollout.sample`).

        Raises:
            NotFiniteError: the model's logits are NaN or infinite.
            OutOfMemoryError: memory runs out even for one row at a time.
        """
        rows = [p for p in range(len(prompts)) for _ in range(n)]
        lengths = [len(prompts[p]) + self.max_new_tokens for p in rows]
        cut = functools.partial(micro_batches, lengths)
        random_RT = self._random_numbers(draw_seeds(len(prompts)) if seeds is None else seeds, n)

        def generate(tokens: int) -> dict[int, Completion]:
            completion_of_row: dict[int, Completion] = {}
            for indices in cut(tokens):
                of_rows = [prompts[rows[i]] for i in indices]
                batch = self._generate(model, tokenizer, of_rows, stop, random_RT[indices])
                completion_of_row.update(zip(indices, batch, strict=True))
            return completion_of_row

        copied = self.dtype_of_copies(model.device, model.dtype)
        with _weights_cast_once(), linear_copies(model, copied):
            completion_of_row = self.token_budget.fit(generate, cut)
        completions = [completion_of_row[row] for row in range(len(rows))]
        return [completions[p * n : (p + 1) * n] for p in range(len(prompts))]

    def dtype_of_copies(self, device: torch.device, dtype: torch.dtype) -> torch.dtype | None:
        """Data type of the linear layers' copies for a model; None if there are none.

        Args:
            device: that the model is on.
            dtype: of the model.
        """
        if self.linear_dtype != "auto":
            return getattr(torch, self.linear_dtype or "", None)
        on_cpu = device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        return torch.float32 if on_cpu and dtype == torch.float32 else None

    def _generate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: list[Sequence[int]],
        stop: str,
        random_BT: Tensor,
    ) -> list[Completion]:
        random_BT = random_BT.to(model.device)
        end_rule = _EndRule(tokenizer, stop)
        all_rows = [_Row() for _ in prompts]
        rows = list(all_rows)  # the rows that are still in the batch
        running = RunningRows(model, prompts, tokenizer.pad_token_id)
        for length in range(1, self.max_new_tokens + 1):
            logits_BV = logits_of(model, running.hidden_BD, self.temperature or 1.0)
            tokens_B, log_probs_B = self._draw(logits_BV, random_BT[:, length - 1])
            for row, token, log_prob in zip(
                rows, tokens_B.tolist(), log_probs_B.tolist(), strict=True
            ):
                if row.finish is None:
                    row.ids.append(token)
                    row.log_probs.append(log_prob)
                    row.finish = end_rule.reason(row.ids)
            unfinished = [b for b, row in enumerate(rows) if row.finish is None]
            if not unfinished or length == self.max_new_tokens:
                break
            if running.can_drop and len(unfinished) <= _UNFINISHED_FRACTION * len(rows):
                kept_B = torch.tensor(unfinished, device=tokens_B.device)
                rows = [rows[b] for b in unfinished]
                tokens_B, random_BT = tokens_B[kept_B], random_BT[kept_B]
                running.keep(kept_B)
            running.append(tokens_B)
        exact = self.linear_dtype in (None, "auto", "float32")
        return [
            Completion(row.ids, row.log_probs, row.finish or "length", exact) for row in all_rows
        ]

    def _random_numbers(self, seeds: Sequence[int], n: int) -> Tensor:
        """Random numbers of R = len(seeds) × n rows, `[R, max_new_tokens]` in [0, 1).

        They are drawn on the CPU, so that they are the same for every device.
        """
        if self.temperature == 0 or not seeds:
            return torch.zeros(len(seeds) * n, self.max_new_tokens)
        dtype = torch.float32 if torch.backends.mps.is_available() else torch.float64
        shape = n, self.max_new_tokens
        return torch.cat(
            [
                torch.rand(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
                for seed in seeds
            ]
        )

    def _draw(self, logits_BV: Tensor, random_B: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a token for each row. Returns tokens `[B]` and their log-probs before truncation.

        Args:
            logits_BV: logits of the next token.
            random_B: a random number in [0, 1) for each row.

        Raises:
            NotFiniteError: a row's logits are NaN or infinite.
        """
        log_probs_BV = logits_BV.log_softmax(-1)
        if log_probs_BV[:, 0].isnan().any():
            raise NotFiniteError(
                "the model's logits are NaN or infinite, so nothing can be sampled"
            )
        no_ids: Any = None  # these processors do not look at the tokens so far
        truncated_BV = self._truncate(no_ids, log_probs_BV)
        if self.temperature == 0:
            tokens_B = truncated_BV.argmax(-1)
        else:
            # Inverting the cumulative distribution takes one random number for each row.
            # `multinomial` draws one for every token of the vocabulary.
            cumulative_BV = truncated_BV.softmax(-1).cumsum(-1, dtype=random_B.dtype)
            total_B1 = cumulative_BV[:, -1:]
            # The product below may be rounded up to the total, which no token would match.
            below_B1 = total_B1.nextafter(torch.zeros_like(total_B1))
            drawn_B1 = (random_B[:, None] * total_B1).minimum(below_B1)
            tokens_B = torch.searchsorted(cumulative_BV, drawn_B1, right=True)[:, 0]
        return tokens_B, log_probs_BV.gather(-1, tokens_B[:, None])[:, 0]


@contextlib.contextmanager
def _weights_cast_once() -> Iterator[None]:
    """Let autocast keep the weights that it has cast.

    Lightning switches this cache off, so the weights would be cast again for every token. Autocast
    keeps only weights that are trained; frozen ones are cast again all the same.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(True)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
        torch.clear_autocast_cache()


@dataclass
class _Row:
    """The tokens and log-probs of a row so far. `finish` is None while the row is unfinished."""

    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish: str | None = None


class _EndRule:
    """Decides whether a row has ended with its newest token, and why."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: str) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.turn_ends = turn_end_ids(tokenizer)
        ids = tokenizer(stop, add_special_tokens=False)["input_ids"]
        # A stop string that is a single token is compared by id, any other by its characters.
        self.stop_id = ids[0] if len(ids) == 1 else None
        self.tail_tokens = len(stop.encode()) + 2  # each token holds at least a byte

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
