"""Decodes rows token by token. Each prompt runs once, and its keys and values are stored once.

`DynamicCache` of transformers copies all keys and values for every new token, and stores a copy of
the prompt's for every completion. Here a new token writes only its own keys and values, and all
completions of a prompt attend to one copy of it, as in Hydragen (arXiv 2402.05099).

Capital letters in names are dimensions: B rows, Q prompts, P prompt tokens (padded), S tokens of a
row so far, H query heads, K key heads, R = H / K query heads for each key head, G rows in the
largest group of one prompt, D head or hidden size, N = G x R, X any last dimension.
"""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlt.llm.batching import pad_rows
from rlt.llm.logprobs import decode, shares_prefixes

_ROOM_TOKENS = 64  # free places after the newest token in a new buffer
_ATTENTION = "rlt_shared_prompts"  # name of `attend` among transformers' attention functions
# Arguments of transformers' attention functions for features that `attend` does not have.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


class RunningRows:
    """B rows that continue prompts. Each different prompt runs once if the model allows that.

    Args:
        model: the model.
        prompts: token ids of the prompt of each row.
        pad_id: token id at padded places.

    Attributes:
        hidden_BD: hidden states of the rows' newest tokens, which predict the next ones.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int
    ) -> None:
        batch = pad_rows([(prompt, ()) for prompt in prompts], pad_id, model.device)
        ids_QP, mask_QP, owner_B = batch.prefix_ids_QP, batch.prefix_mask_QP, batch.owner_B
        self.model = model
        self.cache: Any = DynamicCache(config=model.config)
        self._mask_BS = mask_QP[owner_B]
        self._groups: _Groups | None = None
        if not shares_prefixes(model):
            self.hidden_BD = decode(model, ids_QP[owner_B], self._mask_BS, self.cache)[:, -1]
            return
        buffered = [BufferedLayer() for _ in self.cache.layers]
        self.cache.layers = [*buffered]
        self.hidden_BD = decode(model, ids_QP, mask_QP, self.cache)[:, -1][owner_B]
        if len(ids_QP) == len(owner_B):
            return
        if model._can_set_attn_implementation():
            self._groups = _Groups(mask_QP, owner_B, model.dtype)
            self.cache.layers = [SharedLayer(layer) for layer in buffered]
        else:
            self.cache.batch_select_indices(owner_B)

    @property
    def can_drop(self) -> bool:
        """Whether rows can be removed, which is not possible in recurrent states."""
        return all(hasattr(layer, "batch_select_indices") for layer in self.cache.layers)

    def keep(self, kept_B: Tensor) -> None:
        """Remove all rows except those at the given indices."""
        self._mask_BS = self._mask_BS[kept_B]
        if self._groups is not None:
            kept_Q = self._groups.keep(kept_B)
            for layer in self.cache.layers:
                layer.keep_prompts(kept_Q)
        self.cache.batch_select_indices(kept_B)

    def append(self, tokens_B: Tensor) -> None:
        """Append one token to each row and run it."""
        self._mask_BS = torch.cat([self._mask_BS, self._mask_BS.new_ones(len(tokens_B), 1)], dim=1)
        try:
            self.hidden_BD = self._run(tokens_B)
        except _UnsupportedAttentionError:
            # The first layer raises it for the first token. The rows have no earlier tokens of
            # their own, so it is enough to copy the prompts.
            assert self._groups is not None
            self.cache.layers = [
                layer.for_rows(self._groups.owner_B) for layer in self.cache.layers
            ]
            self._groups = None
            self.hidden_BD = self._run(tokens_B)

    def _run(self, tokens_B: Tensor) -> Tensor:
        with self._attention():
            return decode(self.model, tokens_B[:, None], self._mask_BS, self.cache)[:, -1]

    @contextlib.contextmanager
    def _attention(self) -> Iterator[None]:
        if self._groups is None:
            yield
            return
        config = self.model.config.get_text_config()
        model_attention = config._attn_implementation_internal
        ALL_ATTENTION_FUNCTIONS[_ATTENTION] = partial(attend, self._groups, self.cache)
        config._attn_implementation_internal = _ATTENTION
        try:
            yield
        finally:
            config._attn_implementation_internal = model_attention
            del ALL_ATTENTION_FUNCTIONS[_ATTENTION]  # the entry would keep the cache alive


class _UnsupportedAttentionError(Exception):
    """The model's attention has a feature that `attend` does not have."""


class BufferedLayer(DynamicLayer):
    """A `DynamicLayer` whose `keys` and `values` are views of longer buffers, without gradient."""

    _buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values `[B, K, T, D]` in place; return all keys and values so far."""
        before = 0 if self.keys is None else self.keys.shape[-2]
        total = before + key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < total:
            self._buffers = (
                _with_room(self.keys if before else None, key_states, total),
                _with_room(self.values if before else None, value_states, total),
            )
            self.is_initialized = True
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., before:total, :] = new
        self.keys, self.values = (buffer[..., :total, :] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at the given indices."""
        super().batch_select_indices(indices)
        self._buffers = None


def _with_room(old: Tensor | None, new: Tensor, total: int) -> Tensor:
    buffer = new.new_empty((*new.shape[:-2], total + _ROOM_TOKENS, new.shape[-1]))
    if old is not None:
        buffer[..., : old.shape[-2], :] = old
    return buffer


class SharedLayer(BufferedLayer):
    """Keys and values of Q prompts, and separately those of the tokens that B rows have appended.

    Args:
        prompts: the layer that holds the keys and values of the prompts.
    """

    def __init__(self, prompts: BufferedLayer) -> None:
        super().__init__()
        assert prompts.keys is not None
        assert prompts.values is not None
        self.prompt_keys: Tensor = prompts.keys
        self.prompt_values: Tensor = prompts.values

    def get_seq_length(self) -> int:
        """Return the number of tokens of a row: those of its prompt and those appended."""
        return self.prompt_keys.shape[-2] + (0 if self.keys is None else self.keys.shape[-2])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at the given indices. The prompts stay."""
        if self.is_initialized:
            super().batch_select_indices(indices)

    def for_rows(self, owner_B: Tensor) -> BufferedLayer:
        """Return a layer with a copy of its prompt's keys and values for each row."""
        layer = BufferedLayer()
        layer.update(self.prompt_keys[owner_B], self.prompt_values[owner_B])
        return layer

    def keep_prompts(self, kept_Q: Tensor) -> None:
        """Keep the prompts at the given indices."""
        if len(kept_Q) < len(self.prompt_keys):
            self.prompt_keys = self.prompt_keys[kept_Q]
            self.prompt_values = self.prompt_values[kept_Q]


class _Groups:
    """A table of Q x G places that says which of B rows continue which of Q prompts.

    Attributes:
        owner_B: index of the prompt of each row.
        row_QG: index of the row at each place. A group smaller than the largest repeats a row.
        place_B: index of the place of each row, in the flattened table.
        bias_Q11P: added to attention scores; it is -inf where a prompt is padded.
    """

    def __init__(self, mask_QP: Tensor, owner_B: Tensor, dtype: torch.dtype) -> None:
        self.bias_Q11P = torch.zeros(mask_QP.shape, dtype=dtype, device=mask_QP.device)
        self.bias_Q11P = self.bias_Q11P.masked_fill(~mask_QP, float("-inf"))[:, None, None]
        self._place(owner_B)

    def _place(self, owner_B: Tensor) -> None:
        self.owner_B = owner_B
        members: list[list[int]] = [[] for _ in range(int(owner_B.max()) + 1)]
        for row, owner in enumerate(owner_B.tolist()):
            members[owner].append(row)
        G = max(map(len, members))
        place_of = {row: q * G + g for q, rows in enumerate(members) for g, row in enumerate(rows)}
        table = [rows + rows[-1:] * (G - len(rows)) for rows in members]
        self.row_QG = torch.tensor(table, device=owner_B.device)
        self.place_B = torch.tensor([place_of[b] for b in range(len(owner_B))]).to(owner_B.device)

    def keep(self, kept_B: Tensor) -> Tensor:
        """Keep the rows at the given indices. Returns the indices of the prompts with rows left."""
        kept_Q, owner_B = self.owner_B[kept_B].unique(return_inverse=True)
        self.bias_Q11P = self.bias_Q11P[kept_Q]
        self._place(owner_B)
        return kept_Q

    def gather(self, rows_BKRX: Tensor) -> Tensor:
        """Put the rows of each prompt side by side: `[B, K, R, X]` to `[Q, K, N, X]`."""
        return rows_BKRX[self.row_QG].transpose(1, 2).flatten(2, 3)

    def scatter(self, places_QKNX: Tensor, R: int) -> Tensor:
        """Undo `gather`: `[Q, K, N, X]` to `[B, K, R, X]`."""
        return places_QKNX.unflatten(2, (-1, R)).transpose(1, 2).flatten(0, 1)[self.place_B]


def attend(
    groups: _Groups,
    cache: DynamicCache,
    module: Any,
    query_BH1D: Tensor,
    key_BKSD: Tensor,
    value_BKSD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of one new token of each row to its prompt and its row's own tokens.

    A single softmax covers both parts, so the result is the attention over the whole row. The
    signature is that of transformers' attention functions.

    Args:
        groups: which rows continue which prompts.
        cache: the cache, whose layers are `SharedLayer`s.
        module: the attention module that calls this function.
        query_BH1D: queries of the new tokens.
        key_BKSD: keys of the tokens that the rows have appended, the new ones included.
        value_BKSD: the values of these tokens.
        attention_mask: must be None.
        scaling: factor of the attention scores; None is 1 / sqrt(D).
        **more: further arguments that transformers passes.

    Returns:
        The attention output `[B, 1, H, D]`, and None in place of the attention weights.

    Raises:
        _UnsupportedAttentionError: the model applies a mask of its own, caps scores or adds a bias.
    """
    if attention_mask is not None or any(more.get(name) is not None for name in _UNSUPPORTED):
        raise _UnsupportedAttentionError
    layer: Any = cache.layers[module.layer_idx]
    K = key_BKSD.shape[1]
    query_BKRD = query_BH1D[:, :, 0].unflatten(1, (K, -1))
    query_BKRD = query_BKRD * (scaling or query_BKRD.shape[-1] ** -0.5)
    R, P = query_BKRD.shape[2], layer.prompt_keys.shape[2]
    to_prompts = groups.gather(query_BKRD) @ layer.prompt_keys.mT + groups.bias_Q11P
    to_own = query_BKRD @ key_BKSD.mT
    scores_BKRS = torch.cat([groups.scatter(to_prompts, R), to_own], dim=-1)
    weights_BKRS = scores_BKRS.softmax(-1, dtype=torch.float32).to(value_BKSD.dtype)
    from_prompts = groups.gather(weights_BKRS[..., :P]) @ layer.prompt_values
    from_own = weights_BKRS[..., P:] @ value_BKSD
    values_BKRD = groups.scatter(from_prompts, R) + from_own
    return values_BKRD.flatten(1, 2)[:, None], None
