"""Linear layers that sample from copies of their weights, in another data type.

To write one token for each of a few rows, a model reads all of its weights once, and this reading
is what the time goes into. Copies in bfloat16 halve it. An adapter is added into the copies, so
its two small matrix products a layer are saved too. Everything but the linear layers (embeddings,
norms, attention with its keys and values) keeps its data type.

Completions are then drawn from a distribution that is rounded a little differently than the one
that the training computes. `algorithm.correction` weighs their tokens accordingly.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlt.llm.adapter_layers import merged_weights


class LinearCopy(nn.Module):
    """A linear layer with a copy of a layer's weights, for inference.

    Args:
        weight: `[out, in]`, as the layer computes with it.
        bias: `[out]`, or None.
        dtype: of the copy. Inputs are rounded to it, and outputs have the inputs' own type.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer's outputs."""
        y = nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias)
        return y.to(x.dtype)


@contextlib.contextmanager
def linear_copies(model: PreTrainedModel, dtype: torch.dtype | None) -> Iterator[None]:
    """Have a model compute with copies of its linear layers, the head included.

    Args:
        model: the model; its own layers are back in their places afterwards.
        dtype: of the copies; None computes with the layers themselves.
    """
    layers: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        if dtype is not None:
            for name, layer, weight, bias in merged_weights(model):
                parent, _, last = name.rpartition(".")
                owner = model.get_submodule(parent)
                layers.append((owner, last, layer))
                setattr(owner, last, LinearCopy(weight, bias, dtype))
        yield
    finally:
        for owner, last, layer in layers:
            setattr(owner, last, layer)
