"""A model whose weights are divided among ranks: fully sharded data parallelism (torch's FSDP2).

Each rank holds a part of every weight, of its gradient and of its optimizer state. A decoder layer
is gathered while it computes and is let go afterwards; embeddings, last norm and head are gathered
for a whole forward and backward pass. Every pass is therefore the work of all ranks together, and
every rank needs the same passes in the same order. Within `whole_weights` all layers stay gathered,
and each rank runs what it likes, without gradient.

Functions that run a model take it as their first argument and call parts of it. `run` has torch
take such a function for the model's forward pass.
"""

import contextlib
import copy
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from rlt.llm import nf4

Given = ParamSpec("Given")
Result = TypeVar("Result")

_RUN = "run_function"  # name of the method that is a sharded model's forward pass


def shard_(model: PreTrainedModel, mesh: DeviceMesh, dtype: torch.dtype | None) -> PreTrainedModel:
    """Divide a model's weights among the ranks of a mesh, in place.

    Args:
        model: the same on every rank.
        mesh: of one dimension.
        dtype: that layers are gathered and compute in; None: the weights' own. Gradients are summed
            over ranks in float32.

    Returns:
        A plain model of the same class and buffers, whose weights are on the device `meta`; for
        `plain_copy`.

    Raises:
        ValueError: weights are held in NF4.
    """
    if nf4.is_in_nf4(model):
        raise ValueError(
            "hardware.strategy=fsdp: weights that are held in NF4 cannot be divided among ranks; "
            "choose adapter=lora, or hardware=ddp"
        )
    empty = {id(p): _without_data(p) for p in model.parameters()}
    skeleton: PreTrainedModel = copy.deepcopy(model, empty)
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    layer_classes = set(model._no_split_modules or ())
    for module in list(model.modules()):
        if type(module).__name__ in layer_classes:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for part in _parts(model):
        part.set_gradient_divide_factor(1.0)  # the loss is weighted over the rows of all ranks
        part.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
    setattr(model, _RUN, types.MethodType(_call, model))
    register_fsdp_forward_method(model, _RUN)
    # torch takes the first module that it sees run for the root.
    run(model, lambda _: None)
    return skeleton


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_` has divided the model's weights."""
    return isinstance(model, FSDPModule)


def run(
    model: PreTrainedModel,
    function: Callable[Concatenate[PreTrainedModel, Given], Result],
    *args: Given.args,
    **kwargs: Given.kwargs,
) -> Result:
    """Return `function(model, …)`, run as the forward pass of a sharded model."""
    if not is_sharded(model):
        return function(model, *args, **kwargs)
    found: Result = getattr(model, _RUN)(function, *args, **kwargs)
    return found


@contextlib.contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Each rank has all weights, and needs no other rank to run the model without gradient.

    All ranks enter it together. It does nothing for a model that is not sharded.
    """
    if not is_sharded(model):
        yield
        return
    for part in _parts(model):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in _parts(model):
            part.reshard()
            is_root: bool = part is model  # type: ignore[comparison-overlap]
            part.set_reshard_after_forward(not is_root, recurse=False)


def plain_copy(model: PreTrainedModel, skeleton: PreTrainedModel) -> PreTrainedModel | None:
    """Fill the skeleton that `shard_` returned with the weights, in CPU memory, on rank 0.

    All ranks call it together; it returns None on the others.
    """
    weights = gathered(model.state_dict())
    if weights is None:
        return None
    skeleton.load_state_dict(weights, assign=True)
    skeleton.tie_weights()
    for ours, theirs in zip(skeleton.parameters(), model.parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)
    return skeleton


def gathered(state: Any) -> Any:
    """Put whole tensors in CPU memory in place of parts, in nested dicts and lists.

    All ranks call it together, with the same structure. It returns None but on rank 0.
    """
    found = _mapped(state, _to_rank_0)
    return found if torch.distributed.get_rank() == 0 else None


def divided(values: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Cut whole tensors as those of the same names are cut; the rest stays as it is."""
    return {name: _cut_like(value, like.get(name)) for name, value in values.items()}


def divided_optimizer_state(state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """Cut an optimizer's whole state as its parameters are cut."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    cut = {
        place: {name: _cut_like(value, parameters[place]) for name, value in of_one.items()}
        for place, of_one in state["state"].items()
    }
    return state | {"state": cut}


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be divided; all ranks call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _call(model: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(model, *args, **kwargs)


def _parts(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _without_data(parameter: nn.Parameter) -> nn.Parameter:
    empty = torch.empty_like(parameter, device="meta")
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)


def _to_rank_0(tensor: DTensor) -> Tensor | None:
    full = tensor.full_tensor()
    return full.cpu() if torch.distributed.get_rank() == 0 else None


def _mapped(state: Any, change: Callable[[DTensor], Any]) -> Any:
    if isinstance(state, DTensor):
        return change(cast(DTensor, state.detach()))
    if isinstance(state, Mapping):
        return {name: _mapped(value, change) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_mapped(value, change) for value in state)
    return state


def _cut_like(value: Any, like: Any) -> Any:
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    here = value.to(like.device)
    # Every rank has read the whole tensor: none of it is sent.
    return distribute_tensor(here, like.device_mesh, like.placements, src_data_rank=None)
