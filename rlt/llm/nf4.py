"""Linear layers held in NF4, about half a byte a weight, by the library bitsandbytes.

NF4 is the data type of QLoRA (Dettmers et al., arXiv 2305.14314). Blocks of 64 weights share a
scale; with double quantisation the scales are stored in 8 bits too. A layer computes in the data
type that its model had, from weights that are dequantised for each matrix product. Such weights are
never trained. The language-model head is left as it is, because log-probs are computed from its
weight in chunks.
"""

import importlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rlt.runs.files import read_json

BYTES_EACH = 0.5 + 1 / 64 + 4 / (64 * 256)  # of a weight and its share of the 8-bit scales
BYTES_EACH_SINGLE = 0.5 + 4 / 64  # with scales in float32
NF4_FILE = "nf4.json"
MISSING = "NF4 weights need bitsandbytes: pip install 'rlt[qlora]'"
_MOST_DIFFERENCE = 1e-2  # of a log-prob, between training and evaluation, in nats


def is_installed() -> bool:
    """Whether bitsandbytes can be imported; it is not imported by this."""
    return importlib.util.find_spec("bitsandbytes") is not None


def bitsandbytes() -> Any:
    """The library, imported when it is first needed.

    Raises:
        ValueError: it is not installed.
    """
    if not is_installed():
        raise ValueError(MISSING)
    return importlib.import_module("bitsandbytes")


def linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    """Name and module of every linear layer but the head."""
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            yield name, module


def is_in_nf4(model: nn.Module) -> bool:
    """Whether a layer of the model is held in NF4."""
    return any(hasattr(p, "quant_state") for p in model.parameters())


def hold_in_nf4_(model: PreTrainedModel, double: bool) -> None:
    """Replace the weights of all linear layers but the head by their NF4 codes, in place.

    Layers that are held in NF4 already are left alone. The model is frozen.

    Args:
        double: quantise the scales too.

    Raises:
        ValueError: bitsandbytes is not installed, or the model computes other log-probs in
            evaluation than in training.
    """
    bnb = bitsandbytes()
    for name, linear in linear_layers(model):
        if isinstance(linear, bnb.nn.Linear4bit):
            continue
        held = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=linear.bias is not None,
            compute_dtype=linear.weight.dtype, compress_statistics=double, quant_type="nf4",
            device="meta",
        )  # fmt: skip
        held.weight = bnb.nn.Params4bit(
            linear.weight.data, requires_grad=False, compress_statistics=double, quant_type="nf4"
        ).to(linear.weight.device)
        held.bias = linear.bias
        # On CPUs with AVX512-bf16 an evaluation would repack the weights, and every later forward
        # of a training would then compute with them rounded to bfloat16.
        held.support_avx512bf16_for_cpu = False
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, held.train(linear.training))
    for parameter in model.parameters():
        # A file of weights is mapped, and all of it stays in memory as long as one is in use.
        if parameter.device.type == "cpu" and not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.clone()
    model.__dict__["is_loaded_in_4bit"] = True  # peft chooses the adapter's class by it
    model.requires_grad_(False)
    _require_same_in_training(model)


def _require_same_in_training(model: PreTrainedModel) -> None:
    """Refuse a model whose log-probs in evaluation are not those that training computes."""
    device = next(model.parameters()).device
    if device.type == "meta":
        return
    ids = torch.arange(8, device=device)[None] % model.config.get_text_config().vocab_size
    embeddings = model.get_input_embeddings()(ids).detach()
    log_probs = []
    for with_gradient in (True, False, True):
        with torch.set_grad_enabled(with_gradient):
            inputs = embeddings.clone().requires_grad_(with_gradient)
            logits = model(inputs_embeds=inputs, use_cache=False).logits
        log_probs.append(logits.detach().float().log_softmax(-1))
    difference = max(float((one - log_probs[0]).abs().max()) for one in log_probs[1:])
    if not difference <= _MOST_DIFFERENCE:  # or NaN
        raise ValueError(
            f"in NF4 this model's log-probs differ by {difference:.2g} between training and "
            "evaluation, so its rewards would be wrong; choose adapter=lora, or another version of "
            "bitsandbytes"
        )


def hold_plainly_(model: PreTrainedModel) -> None:
    """Replace what is held in NF4 by plain layers with the weights that these compute with."""
    for name, module in list(model.named_modules()):
        if hasattr(getattr(module, "weight", None), "quant_state"):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, plain_linear(module))
    model.__dict__.pop("is_loaded_in_4bit", None)


def plain_linear(held: Any) -> nn.Linear:
    """A linear layer with the weights that an NF4 layer computes with, in its own data type."""
    weight = bitsandbytes().functional.dequantize_4bit(held.weight.data, held.weight.quant_state)
    bias = held.bias
    plain = nn.Linear(held.in_features, held.out_features, bias is not None, device="meta")
    plain.weight = nn.Parameter(weight.to(held.compute_dtype), requires_grad=False)
    plain.bias = bias
    return plain.train(held.training)


def scales(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name → tensor of what an NF4 weight has beside its codes; empty for any other weight."""
    state = getattr(weight, "quant_state", None)
    return {} if state is None else dict(state.as_dict(packed=True))


def equal_scales(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two weights with the same codes stand for the same numbers."""
    own, other = scales(a), scales(b)
    return own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own)


def uses_double(model: nn.Module) -> bool:
    """Whether the scales of a model's NF4 weights are quantised too."""
    states = (getattr(p, "quant_state", None) for p in model.parameters())
    return any(state is not None and state.nested for state in states)


def write_nf4_file(model: nn.Module, folder: Path) -> None:
    """Note in an adapter's folder that its base was held in NF4, if it was."""
    if is_in_nf4(model):
        (folder / NF4_FILE).write_text(json.dumps({"double": uses_double(model)}) + "\n")


def read_nf4_file(folder: Path) -> bool | None:
    """Whether the base of an adapter had double quantisation; None if it was not in NF4."""
    file = folder / NF4_FILE
    return bool(read_json(file)["double"]) if file.is_file() else None
