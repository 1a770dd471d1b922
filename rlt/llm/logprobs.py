"""Log-probabilities of tokens: the only module that shifts, masks, gathers or chunks them.

Only continuation tokens of rows are scored (`rlt.llm.batching` lays rows out: left-padded prefixes
beside right-padded continuations, so that the hidden states that predict the continuation are one
slice). Rows that begin alike run their prefix once; its cache is expanded to each of them, with and
without gradient. What all prefixes of a batch begin with, such as a system prompt, is run once as
well. The language-model head runs in chunks over the continuation alone, in float32: `[B, T, V]`
never exists.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rlt.llm.batching import PaddedRows, Row, cut_rows, pad_rows

# Tokens that must be saved before a batch's trunk is worth a forward pass of its own.
_LEAST_SAVED_TOKENS = 128
# Logits held at once: 2^25 float32 values are 128 MiB.
_MAX_LOGITS = 2**25


def shares_prefixes(model: Any) -> bool:
    """Whether a prefix can be run once and its cache expanded to the rows that begin with it.

    It can where every layer's cache is plain keys and values. It cannot for sliding windows,
    recurrent states and layers that share keys, nor in a training forward with gradient
    checkpointing, which transformers runs without a cache; rows are then run whole.
    """
    if model.training and any(
        getattr(module, "gradient_checkpointing", False) for module in model.modules()
    ):
        return False
    if getattr(model, "_is_stateful", False):
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def continuation_hidden(model: Any, batch: PaddedRows) -> Tensor:
    """Hidden states `[N, D]` that predict the N real continuation tokens, row by row.

    Rows of the same prefix run it once, and gradients flow back through its expanded cache.
    """
    owner_B, mask_BC = batch.owner_B, batch.mask_BC
    Q = len(batch.prefix_ids_QP)
    has_trunk = (Q - 1) * batch.trunk_tokens >= _LEAST_SAVED_TOKENS
    if not ((len(owner_B) > Q or has_trunk) and shares_prefixes(model)):
        ids_BT = torch.cat([batch.prefix_ids_QP[owner_B], batch.targets_BC], dim=1)
        mask_BT = torch.cat([batch.prefix_mask_QP[owner_B], mask_BC], dim=1)
        hidden_BTD = decode(model, ids_BT, mask_BT)
        return hidden_BTD[:, -mask_BC.shape[1] - 1 : -1][mask_BC]
    cache = DynamicCache(config=model.config)
    ids_QP, mask_QP = batch.prefix_ids_QP, batch.prefix_mask_QP
    if has_trunk:
        ids_QP, mask_QP = _run_trunk(model, batch, cache)
    last_QD = decode(model, ids_QP, mask_QP, cache)[:, -1]
    hidden_BCD = last_QD[owner_B][:, None]
    if mask_BC.shape[1] > 1:
        cache.batch_select_indices(owner_B)
        mask_BT = torch.cat([mask_QP[owner_B], mask_BC[:, :-1]], dim=1)
        rest_BCD = decode(model, batch.targets_BC[:, :-1], mask_BT, cache)
        hidden_BCD = torch.cat([hidden_BCD, rest_BCD], dim=1)
    return hidden_BCD[mask_BC]


def _run_trunk(model: Any, batch: PaddedRows, cache: Any) -> tuple[Tensor, Tensor]:
    """Run a batch's trunk once, for all its prefixes, into an empty cache.

    Returns:
        The prefixes' other tokens, and a mask over trunk and other tokens. A shorter prefix has
        its padding between the two: there its last trunk tokens stand once more, masked.
    """
    trunk, tokens_Q = batch.trunk_tokens, batch.prefix_mask_QP.sum(1)
    Q, P = batch.prefix_ids_QP.shape
    longest = int(tokens_Q.argmax())
    trunk_ids_1T = batch.prefix_ids_QP[longest : longest + 1, :trunk]
    decode(model, trunk_ids_1T, torch.ones_like(trunk_ids_1T, dtype=torch.bool), cache)
    cache.batch_select_indices(torch.zeros_like(tokens_Q))
    places_P = torch.arange(P - trunk, device=tokens_Q.device)
    rest_mask_QP = places_P >= (P - tokens_Q)[:, None]
    mask_QP = torch.cat([rest_mask_QP.new_ones(Q, trunk), rest_mask_QP], dim=1)
    return batch.prefix_ids_QP[:, trunk:], mask_QP


def decode(model: Any, ids_BT: Tensor, mask_BS: Tensor, cache: Any = None) -> Tensor:
    """Hidden states `[B, T, D]` of the last T of S tokens; a cache holds those before."""
    decoder = model.base_model
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BS.long()}
    if _takes_positions(type(decoder).forward):
        positions_BS = (mask_BS.cumsum(-1) - 1).clamp(min=0)
        inputs["position_ids"] = positions_BS[:, -ids_BT.shape[1] :]
    if cache is None:
        return decoder(**inputs, use_cache=False).last_hidden_state
    return decoder(**inputs, past_key_values=cache, use_cache=True).last_hidden_state


@functools.cache
def _takes_positions(forward: Callable[..., Any]) -> bool:
    return "position_ids" in inspect.signature(forward).parameters


def logits_of(model: Any, hidden_ND: Tensor, temperature: float) -> Tensor:
    """float32 logits `[N, V]` at a temperature, as the model's own forward would give them."""
    config = model.config
    softcap = getattr(config, "final_logit_softcapping", None)
    head = model.get_output_embeddings()
    if not softcap and getattr(head, "bias", None) is None and hidden_ND.dtype == torch.float32:
        # The head is linear: N × D divisions do for N × V, with and without gradient.
        hidden_ND, temperature = hidden_ND / temperature, 1.0
    logits_NV = head(hidden_ND).float()
    if getattr(config, "logits_scaling", None):  # Granite
        logits_NV = logits_NV / config.logits_scaling
    if getattr(config, "logit_scale", None):  # Cohere
        logits_NV = logits_NV * config.logit_scale
    if softcap:
        logits_NV = torch.tanh(logits_NV / softcap) * softcap
    return logits_NV if temperature == 1.0 else logits_NV / temperature


def check_head(model: Any) -> None:
    """Refuse a model whose logits are not `logits_of` its hidden states (a scaled head, say).

    Raises:
        ValueError: the two differ.
    """
    ids = torch.tensor([[1, 2, 3]], device=model.device)
    with torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits[0].float()
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        ours = logits_of(model, hidden, 1.0)
    if (own - ours).abs().max() > 0.02 * own.abs().max():
        raise ValueError(
            f"{type(model).__name__}: logits are not a plain head over the hidden states "
            f"(largest difference {(own - ours).abs().max():.3g}); this architecture is not "
            "supported, choose another model"
        )


def _chunks(model: Any, N: int) -> list[slice]:
    size = max(1, _MAX_LOGITS // model.get_output_embeddings().weight.shape[0])
    return [slice(start, start + size) for start in range(0, N, size)]


class _ChosenLogProbs(torch.autograd.Function):
    """`log_softmax` and `gather` in one, so that the backward pass makes a single `[N, V]`."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        log_probs_NV = logits_NV.log_softmax(-1)
        entropy_N = -log_probs_NV.exp().mul_(log_probs_NV).sum(-1)
        ctx.save_for_backward(log_probs_NV, targets_N)
        ctx.mark_non_differentiable(entropy_N)
        return log_probs_NV.gather(-1, targets_N[:, None])[:, 0], entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        log_probs_NV, targets_N = ctx.saved_tensors
        grad_N1 = grads[0][:, None]
        grad_NV = log_probs_NV.exp().mul_(-grad_N1)
        return grad_NV.scatter_add_(-1, targets_N[:, None], grad_N1), None


def log_probs_and_entropies(
    model: Any, hidden_ND: Tensor, targets_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probs `[N]` of the targets and entropies `[N]` (nats; no gradient) of their places."""

    def one(hidden_nD: Tensor, targets_n: Tensor) -> Any:
        return _ChosenLogProbs.apply(logits_of(model, hidden_nD, temperature), targets_n)

    chunks = _chunks(model, len(targets_N))
    if not chunks:
        empty = hidden_ND.new_zeros(0, dtype=torch.float32)
        return empty, empty
    if len(chunks) == 1:
        return one(hidden_ND, targets_N)
    # A chunk's logits are made again in the backward pass instead of being kept.
    parts = [checkpoint(one, hidden_ND[c], targets_N[c], use_reentrant=False) for c in chunks]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


@torch.no_grad()
def chunked_log_probs(
    model: Any, hidden_ND: Tensor, targets_N: Tensor, temperature: float
) -> Tensor:
    """Log-probs `[N]` of the targets, without gradient."""
    parts = [hidden_ND.new_zeros(0, dtype=torch.float32)]
    for chunk in _chunks(model, len(targets_N)):
        log_probs_nV = logits_of(model, hidden_ND[chunk], temperature).log_softmax(-1)
        parts.append(log_probs_nV.gather(-1, targets_N[chunk][:, None])[:, 0])
    return torch.cat(parts)


class _ExactKL(torch.autograd.Function):
    """KL(p‖q) `[N]` of two sets of logits, with gradient to p's alone, which is one `[N, V]`."""

    @staticmethod
    def forward(ctx: Any, p_logits_NV: Tensor, q_logits_NV: Tensor) -> Tensor:
        log_ratio_NV = p_logits_NV.log_softmax(-1)
        probs_NV = log_ratio_NV.exp()
        log_ratio_NV -= q_logits_NV.log_softmax(-1)
        kl_N = (probs_NV * log_ratio_NV).sum(-1)
        ctx.save_for_backward(probs_NV.mul_(log_ratio_NV.sub_(kl_N[:, None])))
        return kl_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (slope_NV,) = ctx.saved_tensors
        return slope_NV * grads[0][:, None], None


def exact_kl(
    p_model: Any, p_hidden_ND: Tensor, q_model: Any, q_hidden_ND: Tensor,
    temperature: float,
) -> Tensor:  # fmt: skip
    """KL(p‖q) over the vocabulary at each of N places, in nats, with gradient to p's model."""

    def one(p_hidden_nD: Tensor, q_hidden_nD: Tensor) -> Any:
        with torch.no_grad():
            q_logits_nV = logits_of(q_model, q_hidden_nD, temperature)
        return _ExactKL.apply(logits_of(p_model, p_hidden_nD, temperature), q_logits_nV)

    parts = [p_hidden_ND.new_zeros(0, dtype=torch.float32)]
    for chunk in _chunks(p_model, len(p_hidden_ND)):
        parts.append(checkpoint(one, p_hidden_ND[chunk], q_hidden_ND[chunk], use_reentrant=False))
    return torch.cat(parts)


def chunked_exact_kl(
    p_model: Any, p_hidden_ND: Tensor, q_model: Any, q_hidden_ND: Tensor,
    temperature: float,
) -> Tensor:  # fmt: skip
    """KL(p‖q) over the vocabulary at each of N places, in nats, without gradient."""
    parts = [p_hidden_ND.new_zeros(0, dtype=torch.float32)]
    with torch.no_grad():
        for chunk in _chunks(p_model, len(p_hidden_ND)):
            p_NV = logits_of(p_model, p_hidden_ND[chunk], temperature).log_softmax(-1)
            q_NV = logits_of(q_model, q_hidden_ND[chunk], temperature).log_softmax(-1)
            parts.append((p_NV.exp() * (p_NV - q_NV)).sum(-1))
    return torch.cat(parts)


def batch_log_probs(
    model: Any, batch: PaddedRows, temperature: float, hidden_ND: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies `[B, C]` of a padded batch, zero where padded; with gradient.

    Args:
        hidden_ND: the batch's `continuation_hidden`, where it is at hand already.
    """
    if hidden_ND is None:
        hidden_ND = continuation_hidden(model, batch)
    values_N, entropy_N = log_probs_and_entropies(
        model, hidden_ND, batch.targets_BC[batch.mask_BC], temperature
    )
    log_probs_BC = torch.zeros(batch.mask_BC.shape, device=values_N.device)
    log_probs_BC = log_probs_BC.masked_scatter(batch.mask_BC, values_N)
    entropy_BC = torch.zeros_like(log_probs_BC).masked_scatter(batch.mask_BC, entropy_N)
    return log_probs_BC, entropy_BC


@torch.no_grad()
def row_log_probs(
    model: Any,
    rows: Sequence[Row],
    *,
    temperature: float,
    pad_id: int,
    token_budget: int,
    visit: Callable[[list[int], PaddedRows, Tensor], None] | None = None,
) -> list[Tensor]:
    """Log-probs of every row's continuation tokens, a float32 vector a row, in the rows' order.

    Args:
        visit: called with row indices, padded rows and hidden states `[N, D]` of each
            micro-batch, for what else is to be read off the same forward pass.
    """
    results: list[Tensor] = [torch.zeros(0)] * len(rows)
    for indices in cut_rows(rows, token_budget, shares_prefixes(model)):
        batch = pad_rows([rows[i] for i in indices], pad_id, model.device)
        hidden_ND = continuation_hidden(model, batch)
        values_N = chunked_log_probs(model, hidden_ND, batch.targets_BC[batch.mask_BC], temperature)
        lengths = [len(rows[i][1]) for i in indices]
        for index, values in zip(indices, values_N.split(lengths), strict=True):
            results[index] = values
        if visit is not None:
            visit(indices, batch, hidden_ND)
    return results
