"""Counts the floating-point operations of a forward pass and measures the device's best rate.

Their ratio is the model FLOPs utilisation as PaLM defines it (arXiv 2204.02311, appendix B). Only
the model's matrix products over the tokens that the method needs are counted. Recomputation and
padding are not counted.
"""

import functools
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlt.llm.batching import Row, trunk_tokens

_SIZE = 1024  # rows and columns of the matrices whose product is timed
_SECONDS = 0.2


def forward_flops(model: PreTrainedModel, rows: Sequence[Row], shared: bool) -> float:
    """Return the floating-point operations of one forward pass.

    A backward pass takes twice as many.

    Args:
        model: a causal language model.
        rows: prefixes and continuations. The head runs on the continuation tokens alone.
        shared: whether rows of the same prefix run it once, and all rows run their trunk once
            (see `rlt.llm.logprobs.shares_prefixes`).
    """
    distinct = {tuple(prefix) for prefix, _ in rows}
    prefixes = [len(prefix) for prefix in (distinct if shared else [p for p, _ in rows])]
    trunk = trunk_tokens(list(distinct)) if shared else 0
    continuations = sum(len(continuation) for _, continuation in rows)
    tokens = sum(prefixes) - trunk * (len(prefixes) - 1) + continuations
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    assert isinstance(embedding, Tensor)
    tied = head is embedding
    parameters = sum(p.numel() for p in model.parameters())
    body = parameters - embedding.numel() - (0 if tied else head.numel())
    config = model.config.get_text_config()
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    # Pairs of tokens that attend to each other: a token attends to itself and to those before it.
    pairs = sum(P * P / 2 for P in prefixes) - (len(prefixes) - 1) * trunk * trunk / 2
    pairs += sum(len(c) * len(p) + len(c) * len(c) / 2 for p, c in rows)
    attention = 4 * config.num_hidden_layers * width * pairs
    return float(2 * body * tokens + 2 * head.numel() * continuations + attention)


@functools.cache
def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Return the best rate of a large matrix product on this device, in operations per second.

    The rate is measured at the first call for a device and a data type, which takes about 0.2 s.
    """
    # Matrices of ones leave the random number generator as it is.
    a, b = (torch.ones(_SIZE, _SIZE, device=device, dtype=dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while best == float("inf") or time.perf_counter() < end:
        started = time.perf_counter()
        (a @ b)[0, 0].item()  # waits until the device has finished
        best = min(best, time.perf_counter() - started)
    return 2 * _SIZE**3 / best
