"""The least that a phase costs: the arithmetic of its matrix products, and what it must read.

Each shared prefix counts once, padding and whatever is computed again not at all, AdamW as nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlt.llm.batching import Row
from rlt.llm.flop_count import forward_flops


@dataclass(frozen=True)
class Floor:
    """Arithmetic that a phase cannot do without, and bytes that it must read.

    Attributes:
        flops: of matrix products, each shared prefix once.
        bytes_read: of weights, keys and values, where tokens come one by one; else 0.
    """

    flops: float
    bytes_read: float = 0.0

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The slower of the two, as if they overlapped perfectly."""
        return max(self.flops / flops_per_second, self.bytes_read / bytes_per_second)


def prefill_floor(model: Any, rows: Sequence[Row]) -> Floor:
    """The prompts of rows, each different one once."""
    return Floor(forward_flops(model, [(prefix, ()) for prefix, _ in rows], shared=True))


def decode_floor(model: Any, rows: Sequence[Row]) -> Floor:
    """Continuations token by token, but for the first, which comes with the prompt.

    A token step reads all weights once, and every row's own keys and values.
    """
    rest = [(prefix, continuation[1:]) for prefix, continuation in rows]
    flops = forward_flops(model, rest, shared=True) - prefill_floor(model, rows).flops
    config = model.config.get_text_config()
    head_size = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    values_a_place = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size
    places = sum(len(p) * len(c) + len(c) ** 2 / 2 for p, c in rest)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    weights = sum(p.numel() for p in model.parameters())
    weights -= 0 if embedding is head else embedding.numel()  # a few of its rows are read
    steps = max(len(c) for _, c in rest)
    return Floor(flops, (steps * weights + places * values_a_place) * head.element_size())


def scoring_floor(model: Any, rows: Sequence[Row]) -> Floor:
    """One forward pass."""
    return Floor(forward_flops(model, rows, shared=True))


def update_floor(model: Any, rows: Sequence[Row], needs_reference: bool) -> Floor:
    """Forward and backward of the policy, which is three forwards, and the reference's forward."""
    return Floor((4 if needs_reference else 3) * forward_flops(model, rows, shared=True))
