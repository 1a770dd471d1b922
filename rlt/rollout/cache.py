"""A key-value cache for decoding: prompts run once each, and new tokens are written in place.

transformers' `DynamicCache` makes all keys and values anew for every token. Here they lie in
buffers with room ahead, so that a token costs its own keys and values alone.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rlt.logprobs import decode, pad_rows, shares_prefixes

_ROOM_TOKENS = 64  # places ahead of the newest token when a buffer is made


class BufferedLayer(DynamicLayer):
    """A `DynamicLayer` whose `keys` and `values` are views of longer buffers. Without gradient."""

    _buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        held = self.get_seq_length()
        total = held + key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < total:
            self._buffers = (
                _with_room(self.keys if held else None, key_states, total),
                _with_room(self.values if held else None, value_states, total),
            )
            self.is_initialized = True
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., held:total, :] = new
        self.keys, self.values = (buffer[..., :total, :] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._buffers = None


def _with_room(old: Tensor | None, new: Tensor, total: int) -> Tensor:
    buffer = new.new_empty((*new.shape[:-2], total + _ROOM_TOKENS, new.shape[-1]))
    if old is not None:
        buffer[..., : old.shape[-2], :] = old
    return buffer


def run_prompts(
    model: Any, prompts: Sequence[Sequence[int]], pad_id: int
) -> tuple[Tensor, Tensor, DynamicCache]:
    """Run prompts, padded on the left to the longest, each different one once where that can be.

    Returns:
        Hidden states `[B, D]` of the prompts' last tokens, mask `[B, P]`, and their cache.
    """
    batch = pad_rows([(prompt, ()) for prompt in prompts], pad_id, model.device)
    ids_QP, mask_QP, owner_B = batch.prefix_ids_QP, batch.prefix_mask_QP, batch.owner_B
    cache = DynamicCache(config=model.config)
    if not shares_prefixes(model):
        mask_BP = mask_QP[owner_B]
        return decode(model, ids_QP[owner_B], mask_BP, cache)[:, -1], mask_BP, cache
    cache.layers = [BufferedLayer() for _ in cache.layers]
    hidden_QD = decode(model, ids_QP, mask_QP, cache)[:, -1]
    if len(ids_QP) < len(owner_B):
        cache.batch_select_indices(owner_B)
    return hidden_QD[owner_B], mask_QP[owner_B], cache
