"""How much arithmetic a forward pass is, and how much of the machine's it is.

Model FLOPs utilisation as PaLM counts it (arXiv 2204.02311, appendix B): matrix products of the
model over the tokens that the method needs, without what is computed again or for padding.
"""

import functools
import time
from collections.abc import Sequence
from typing import Any

import torch

from rlt.llm.batching import Row, trunk_tokens

_SIZE = 1024  # of the square matrices whose product is timed
_SECONDS = 0.2


def forward_flops(model: Any, rows: Sequence[Row], shared: bool) -> float:
    """Floating-point operations of one forward pass; a backward pass takes twice as many.

    Args:
        shared: rows of the same prefix run it once, and so they do what all prefixes begin with
            (see `rlt.llm.logprobs.shares_prefixes`).
    """
    distinct = {tuple(prefix) for prefix, _ in rows}
    prefixes = [len(prefix) for prefix in (distinct if shared else [p for p, _ in rows])]
    trunk = trunk_tokens(list(distinct)) if shared else 0
    continuations = sum(len(continuation) for _, continuation in rows)
    tokens = sum(prefixes) - trunk * (len(prefixes) - 1) + continuations
    embedding = model.get_input_embeddings().weight.numel()
    head = model.get_output_embeddings().weight
    tied = head is model.get_input_embeddings().weight
    body = sum(p.numel() for p in model.parameters()) - embedding - (0 if tied else head.numel())
    config = model.config.get_text_config()
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    # A token attends to itself and to those before.
    pairs = sum(P * P / 2 for P in prefixes) - (len(prefixes) - 1) * trunk * trunk / 2
    pairs += sum(len(c) * len(p) + len(c) * len(c) / 2 for p, c in rows)
    attention = 4 * config.num_hidden_layers * width * pairs
    return float(2 * body * tokens + 2 * head.numel() * continuations + attention)


@functools.cache
def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of a large matrix product on this device, measured once."""
    a, b = (
        torch.ones(_SIZE, _SIZE, device=device, dtype=dtype) for _ in range(2)
    )  # no random numbers
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while best == float("inf") or time.perf_counter() < end:
        started = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * _SIZE**3 / best
