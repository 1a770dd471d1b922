"""Linear layers that sample from copies of their weights.

To write one token for each of a few rows, a model reads all of its weights once, and this reading
is what the time goes into. Copies help in three ways. On a CPU they are stored in the order in
which oneDNN reads them, and its matrix product for a few rows is then much faster. An adapter is
added into them, so its two small matrix products a layer are saved. And they may be in bfloat16,
which halves what is read. Everything but the linear layers (embeddings, norms, attention with its
keys and values) keeps its data type.

From copies in another data type, completions are drawn with a distribution that is rounded a little
differently than the one that the training computes. `algorithm.correction` weighs their tokens
accordingly. Copies in the layers' own type differ from them by the order of additions alone.
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
        self.is_packed = weight.device.type == "cpu" and _can_pack(dtype)
        if self.is_packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer's outputs."""
        rounded = x.to(self.weight.dtype)
        if self.is_packed:
            # What torch's compiler calls for a linear layer whose weights are frozen.
            y = torch.ops.mkldnn._linear_pointwise(rounded, self.weight, self.bias, "none", [], "")
        else:
            y = nn.functional.linear(rounded, self.weight, self.bias)
        return y.to(x.dtype)


def _can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch and this CPU have oneDNN's linear layer for a data type."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


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
