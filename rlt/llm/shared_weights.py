"""How models in memory share the weights that none of them trains.

Models that share a base hold the same `Parameter` objects: `frozen_copy` makes a reference that
shares every weight that is not trained, and `share_equal_weights` joins models that were loaded one
by one. Each keeps modules of its own, so no adapter is ever switched on or off.
"""

import copy
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from rlt.llm import nf4
from rlt.llm.adapter_layers import adapter_modules, remove_


def frozen_copy(model: PreTrainedModel, moves: bool = False) -> PreTrainedModel:
    """A frozen model that is what this one is now, and shares all weights that are not trained.

    An adapter that adds nothing yet is left out of the copy.

    Args:
        moves: the copy's own weights will be changed, so it keeps an adapter that adds nothing.
    """
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    found = copy.deepcopy(model, shared)
    if not moves and all(not bool(b.any()) for b in _second_matrices(found)):
        remove_(found)
    for parameter in found.parameters():
        if id(parameter) not in shared:
            parameter.requires_grad_(False)
    return found.eval()


def _second_matrices(model: nn.Module) -> Iterator[torch.Tensor]:
    for module in adapter_modules(model).values():
        for b in module.lora_B.values():
            yield b.weight


def share_equal_weights(model: nn.Module, other: nn.Module) -> int:
    """Have a frozen model use the other's weights, where these are frozen and equal bit for bit.

    Returns:
        Bytes that are no longer held twice.
    """
    theirs = {
        _plain(name): p
        for name, p in other.named_parameters(remove_duplicate=False)
        if not p.requires_grad
    }
    saved: dict[int, int] = {}
    for prefix, module in model.named_modules():
        for name, own in list(module._parameters.items()):
            match = theirs.get(_plain(f"{prefix}.{name}"))
            if own is None or own is match or match is None or not _equal(own, match):
                continue
            module._parameters[name] = match
            saved[id(own)] = own.numel() * own.element_size()
    return sum(saved.values())


def _plain(name: str) -> str:
    return name.replace(".base_layer", "")


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    return alike and torch.equal(a, b) and nf4.equal_scales(a, b)
