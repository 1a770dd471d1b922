"""Log-probabilities of the continuation tokens of rows.

Only this module and `rlt.llm.lm_head` shift, mask, gather or chunk tokens to score them.

Only the continuation tokens of rows are scored. `rlt.llm.batching` pads prefixes on the left and
continuations on the right, so the hidden states that predict the continuation are one slice. Rows
with the same prefix run it once: the prefix's cache is expanded to each of them, with or without
gradient. The tokens that all prefixes of a batch begin with, such as a system prompt, are run once
as well. The language-model head (`rlt.llm.lm_head`) runs over the continuation alone.

Capital letters in names are dimensions: B rows, Q prefixes, P prefix tokens, C continuation tokens,
S tokens seen so far, T new tokens, D hidden size, N continuation tokens of all rows.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rlt.llm.batching import PaddedRows, Row, cut_rows, pad_rows
from rlt.llm.lm_head import chunked_log_probs, log_probs_and_entropies
from rlt.llm.shards import is_sharded

# A batch's trunk gets a forward pass of its own if that spares at least this number of tokens.
_LEAST_SAVED_TOKENS = 128


def shares_prefixes(model: PreTrainedModel) -> bool:
    """Whether a prefix can be run once and its cache expanded to the rows that begin with it.

    It can if the cache of every layer is plain keys and values. It cannot if the model has sliding
    windows, recurrent states or layers that share keys. It cannot in training with gradient
    checkpointing either, because transformers then runs without a cache, nor in training with
    sharded weights, as all ranks need passes of the same structure. In these cases every row is run
    as a whole.
    """
    if model.training and is_sharded(model):
        return False
    if model.training and any(
        getattr(module, "gradient_checkpointing", False) for module in model.modules()
    ):
        return False
    if getattr(model, "_is_stateful", False):
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def continuation_hidden(model: PreTrainedModel, batch: PaddedRows) -> Tensor:
    """Return the hidden states `[N, D]` that predict the N real continuation tokens, row by row.

    Rows of the same prefix run it once. Gradients flow back through the prefix's expanded cache.
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


def _run_trunk(
    model: PreTrainedModel, batch: PaddedRows, cache: DynamicCache
) -> tuple[Tensor, Tensor]:
    """Run a batch's trunk once for all of its prefixes, into an empty cache.

    Returns:
        The token ids `[Q, P - trunk]` that follow the trunk in each prefix, and a mask `[Q, P]`
        over the trunk and these tokens. The padding of a shorter prefix lies between the two; the
        last tokens of its trunk are repeated there and masked.
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


def decode(
    model: PreTrainedModel, ids_BT: Tensor, mask_BS: Tensor, cache: DynamicCache | None = None
) -> Tensor:
    """Run the model without its head over the last T of S tokens.

    Args:
        model: the model.
        ids_BT: ids of the T tokens.
        mask_BS: True at the real tokens among all S.
        cache: keys and values of the S - T tokens before; those of the T tokens are added to it.

    Returns:
        The hidden states `[B, T, D]` of the last layer.
    """
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


def batch_log_probs(
    model: PreTrainedModel, batch: PaddedRows, temperature: float, hidden_ND: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return log-probs (with gradient) and entropies of the continuation tokens of a padded batch.

    Args:
        model: the model.
        batch: the padded rows.
        temperature: the logits are divided by it.
        hidden_ND: the batch's `continuation_hidden` if the caller has it already.

    Returns:
        Two tensors `[B, C]` in nats, zero at padded places.
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
    model: PreTrainedModel,
    rows: Sequence[Row],
    *,
    temperature: float,
    pad_id: int,
    token_budget: int,
    visit: Callable[[list[int], PaddedRows, Tensor], None] | None = None,
) -> list[Tensor]:
    """Return the log-probs of the continuation tokens of every row, without gradient.

    Args:
        model: the model.
        rows: prefixes and continuations.
        temperature: the logits are divided by it.
        pad_id: token id at padded places.
        token_budget: most padded tokens of a micro-batch (`rlt.llm.batching.cut_rows`).
        visit: called for each micro-batch with its row indices, padded rows and hidden states
            `[N, D]`, for callers that need more than log-probs from the same forward pass.

    Returns:
        One float32 vector of log-probs in nats for each row, in the order of the rows.
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
