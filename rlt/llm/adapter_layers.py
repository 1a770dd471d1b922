"""The layers of a model that an adapter was added to: to find, to merge and to remove."""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from rlt.llm import nf4
from rlt.llm.models import freeze
from rlt.runs.files import read_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_NAME = "default"
_CONVERSIONS = "_weight_conversions"  # private: transformers, between a model's keys and a file's


def adapter_modules(model: nn.Module) -> dict[str, Any]:
    """Name → module of every layer that an adapter was added to."""
    if not getattr(model, "_hf_peft_config_loaded", False):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The weights that an adapter has added."""
    for module in adapter_modules(model).values():
        base = {id(p) for p in module.get_base_layer().parameters()}
        yield from (p for p in module.parameters() if id(p) not in base)


def adapter_config(model: nn.Module) -> Any:
    """Peft's config of the model's adapter; None if it has none."""
    return model.peft_config[ADAPTER_NAME] if adapter_modules(model) else None  # type: ignore[index]


def is_partly_trained(model: nn.Module) -> bool:
    """Whether some of the weights are not trained."""
    return any(not p.requires_grad for p in model.parameters())


def merged_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with the adapter added into its weights, of the model's own plain class."""
    found = copy.deepcopy(model)
    merge_(found)
    return found


def merge_(model: PreTrainedModel) -> None:
    """Add the adapter into the weights of its layers, in place, and take it off.

    Layers that were held in NF4 become plain ones, so that nothing is rounded once more.
    """
    for module in adapter_modules(model).values():
        if hasattr(module.get_base_layer().weight, "quant_state"):
            plain = nf4.plain_linear(module.get_base_layer())
            plain.weight.data += module.get_delta_weight(ADAPTER_NAME).detach()
            module.base_layer = plain
        else:
            module.merge()
    remove_(model)
    nf4.hold_plainly_(model)


def merged_weights(
    model: PreTrainedModel,
) -> Iterator[tuple[str, nn.Module, Tensor, Tensor | None]]:
    """Name, module, weight `[out, in]` and bias of every linear layer, the head included.

    The weight is what the layer computes with: an adapter is added, NF4 codes are dequantised.
    """
    with_adapter = adapter_modules(model)
    inside = tuple(f"{name}." for name in with_adapter)
    for name, module in list(model.named_modules()):
        if name.startswith(inside):
            continue
        layer: Any = module.get_base_layer() if name in with_adapter else module
        if not isinstance(layer, nn.Linear):
            continue
        if hasattr(layer.weight, "quant_state"):
            layer = nf4.plain_linear(layer)
        weight = layer.weight.detach()
        if name in with_adapter:
            weight = weight + with_adapter[name].get_delta_weight(ADAPTER_NAME).detach()
        yield name, module, weight, layer.bias


def remove_(model: PreTrainedModel) -> None:
    """Take the adapter off, in place; layers keep the weights that they have."""
    for name, module in adapter_modules(model).items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, module.get_base_layer())
    if getattr(model, "_hf_peft_config_loaded", False):
        model._hf_peft_config_loaded = False
        del model.peft_config


def read_adapter_config(folder: Path) -> Mapping[str, Any] | None:
    """The adapter's config in a folder that `save_model` wrote; None if it holds no adapter.

    Raises:
        ValueError: the file cannot be read.
    """
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        return None
    try:
        return dict(read_json(file))
    except ValueError as error:
        raise ValueError(f"{file}: it cannot be read ({error}); save the adapter again") from error


def load_adapter_(model: PreTrainedModel, folder: Path) -> None:
    """Add the adapter in a folder to a model in place, frozen.

    Raises:
        ValueError: it does not fit the model.
    """
    # `load_adapter` leaves the adapter's renaming of keys behind, and a merged model would be saved
    # under names that no model has.
    own = model.__dict__.get(_CONVERSIONS)
    try:
        model.load_adapter(str(folder), adapter_name=ADAPTER_NAME)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{folder}: the adapter does not fit its base model ({str(error).splitlines()[0]}); "
            "choose the model that it was trained on"
        ) from error
    if own is None:
        model.__dict__.pop(_CONVERSIONS, None)
    else:
        model.__dict__[_CONVERSIONS] = own
    freeze(model)
