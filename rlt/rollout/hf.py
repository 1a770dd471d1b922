"""Rollouts with transformers' `generate`, in this process, on the model's own weights.

Log-probs are read from the raw logits at the sampling temperature, before any truncation, so they
are those that the training forward gives for the same tokens. A row stops at EOS or as soon as its
decoded tail holds the stop string, wherever token borders fall.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteria,
    StoppingCriteriaList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rlt.logprobs import micro_batches
from rlt.rollout.base import Completion
from rlt.rollout.cache import prompt_cache
from rlt.tokenizers import turn_end_ids


class HFRollout:
    """Samples with `model.generate`.

    Args:
        temperature: sampling temperature; 0 decodes greedily (log-probs are then at 1).
        max_new_tokens: completions are cut here.
        top_p, top_k, min_p: truncation of the distribution; 1, 0 and 0 switch them off.
        token_budget: rows × (prompt + new tokens) generated at once.

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
        self.top_p = top_p
        self.top_k = top_k
        self.min_p = min_p
        self.token_budget = token_budget

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
        completions: list[Completion | None] = [None] * len(rows)
        for indices in micro_batches(lengths, self.token_budget):
            batch = self._generate(model, tokenizer, [prompts[rows[i]] for i in indices], stop)
            for index, completion in zip(indices, batch, strict=True):
                completions[index] = completion
        done = [c for c in completions if c is not None]
        assert len(done) == len(rows)
        return [done[p * n : (p + 1) * n] for p in range(len(prompts))]

    def _generate(
        self, model: Any, tokenizer: Any, prompts: list[Sequence[int]], stop: str
    ) -> list[Completion]:
        P = max(len(p) for p in prompts)
        pad, eos = tokenizer.pad_token_id, sorted(turn_end_ids(tokenizer))
        ids_BP = torch.tensor([[pad] * (P - len(p)) + list(p) for p in prompts])
        mask_BP = torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in prompts])
        recorder = _Recorder(self.temperature or 1.0)
        stopping = _Stop(tokenizer, stop, P, len(prompts))
        warpers: list[LogitsProcessor] = [recorder]
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        if self.min_p:
            warpers.append(MinPLogitsWarper(self.min_p))
        with _no_generation_defaults(model):
            sequences = model.generate(
                input_ids=ids_BP.to(model.device),
                attention_mask=mask_BP.to(model.device),
                past_key_values=prompt_cache(model, prompts, pad),
                generation_config=GenerationConfig(
                    do_sample=self.temperature > 0,
                    temperature=1.0,  # the recorder has divided by it already
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=self.max_new_tokens,
                    pad_token_id=pad,
                    eos_token_id=eos,
                    use_cache=True,
                ),
                logits_processor=LogitsProcessorList(warpers),
                stopping_criteria=StoppingCriteriaList([stopping]),
            )
        log_probs_BT = recorder.log_probs(sequences).cpu()
        return [
            Completion(
                ids=sequences[b, P : P + length].tolist(),
                log_probs=log_probs_BT[b, :length].tolist(),
                finish=finish,
            )
            for b, (length, finish) in enumerate(stopping.ends(sequences, eos))
        ]


@contextmanager
def _no_generation_defaults(model: Any) -> Iterator[None]:
    """Keep the model's own generation config out: `generate` fills what is unset from it.

    Qwen2.5-Instruct ships a repetition penalty of 1.05, for one, which would sample from other
    log-probs than those that are trained on.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class _Recorder(LogitsProcessor):
    """Divides by the temperature and keeps the log-prob of each token sampled from the result."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self._last_BV: Tensor | None = None
        self._chosen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._gather(input_ids)
        scaled_BV = scores.float() / self.temperature
        self._last_BV = scaled_BV.log_softmax(-1)
        return scaled_BV

    def log_probs(self, sequences: Tensor) -> Tensor:
        """Log-probs `[B, T]` of the sampled tokens."""
        self._gather(sequences)
        return torch.stack(self._chosen, dim=1)

    def _gather(self, ids: Tensor) -> None:
        if self._last_BV is not None:
            self._chosen.append(self._last_BV.gather(-1, ids[:, -1:])[:, 0])
            self._last_BV = None


class _Stop(StoppingCriteria):
    """Stops a row once its decoded tail holds the stop string, and remembers where."""

    def __init__(self, tokenizer: Any, stop: str, prompt_tokens: int, rows: int) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.prompt_tokens = prompt_tokens
        ids = tokenizer(stop, add_special_tokens=False)["input_ids"]
        # A tag that is one token of its own is compared by id; any other by its characters.
        self.stop_id = ids[0] if len(ids) == 1 else None
        self.tail_tokens = len(stop.encode()) + 2  # at least one byte of the tag a token
        self.stopped_at: list[int | None] = [None] * rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        length = input_ids.shape[1] - self.prompt_tokens
        if self.stop_id is not None:
            hits = (input_ids[:, -1] == self.stop_id).tolist()
        else:
            tail = input_ids[:, -min(length, self.tail_tokens) :].tolist()
            texts = self.tokenizer.batch_decode(tail, clean_up_tokenization_spaces=False)
            hits = [self.stop in text for text in texts]
        for row, hit in enumerate(hits):
            if hit and self.stopped_at[row] is None:
                self.stopped_at[row] = length
        done = [at is not None for at in self.stopped_at]
        return torch.tensor(done, device=input_ids.device)

    def ends(self, sequences: Tensor, eos: list[int]) -> list[tuple[int, str]]:
        """(number of tokens, finish reason) of every row."""
        found = []
        for row, stopped in zip(sequences[:, self.prompt_tokens :], self.stopped_at, strict=True):
            hits = torch.isin(row.cpu(), torch.tensor(eos)).nonzero()
            at_eos = int(hits[0, 0]) + 1 if len(hits) else None
            if stopped is not None and (at_eos is None or stopped <= at_eos):
                found.append((stopped, "stop"))
            elif at_eos is not None:
                found.append((at_eos, "eos"))
            else:
                found.append((len(row), "length"))
        return found
