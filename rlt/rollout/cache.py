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


def prompt_cache(model: Any, prompts: Sequence[Sequence[int]], pad_id: int) -> DynamicCache | None:
    """The cache of all prompts but for their last tokens, each different prompt run once.

    Prompts are padded on the left to the longest. None for a model that does not share prefixes,
    or if there is nothing before the last tokens.
    """
    batch = pad_rows([(prompt, ()) for prompt in prompts], pad_id, model.device)
    if batch.prefix_ids_QP.shape[1] < 2 or not shares_prefixes(model):
        return None
    cache = DynamicCache(config=model.config)
    cache.layers = [BufferedLayer() for _ in cache.layers]
    decode(model, batch.prefix_ids_QP[:, :-1], batch.prefix_mask_QP[:, :-1], cache)
    if len(batch.prefix_ids_QP) < len(prompts):
        cache.batch_select_indices(batch.owner_B)
    return cache
