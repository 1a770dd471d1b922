"""LoRA adapters: which weights of a model are trained, and how models share those that are not.

An adapter is added to a Hugging Face model in place, by the model's own `add_adapter`, so the model
keeps its class. All that samples from it or takes its log-probs works as before.

Models that share a base hold the same `Parameter` objects: `frozen_copy` makes a reference that
shares every weight that is not trained, and `share_equal_weights` joins models that were loaded one
by one. Each keeps modules of its own, so no adapter is ever switched on or off.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from rlt.config.allowed_targets import raise_if_any
from rlt.config.fields import at_least, field_errors
from rlt.llm import nf4
from rlt.llm.models import freeze
from rlt.runs.files import read_json

ADAPTER_CONFIG = "adapter_config.json"
_NAME = "default"
_HEAD = "lm_head"
_CONVERSIONS = "_weight_conversions"  # private: transformers, between a model's keys and a file's


class Adapter(Protocol):
    """What is trained of a model.

    Attributes:
        lr_factor: the learning rate of the optimizer's config is multiplied by this.
        merge: also save the model with the adapter merged into its weights.
        quantization: in which form frozen weights are held; None as they were loaded.
        double_quantization: the scales of quantised weights are quantised too.
    """

    lr_factor: float
    merge: bool
    quantization: Literal["nf4"] | None
    double_quantization: bool

    def prepare(self, model: PreTrainedModel) -> None:
        """Change how a loaded model, of any role, holds its weights, in place."""
        ...

    def add_to(self, model: PreTrainedModel) -> None:
        """Add the adapter to a model in place, and let only what is to be trained have gradient."""
        ...


@dataclass(frozen=True)
class NoAdapter:
    """All weights are trained; an adapter that the model was loaded with is merged into them."""

    lr_factor = 1.0
    merge = False
    quantization = cast(Literal["nf4"] | None, None)
    double_quantization = False

    def prepare(self, model: PreTrainedModel) -> None:
        """Leave the weights as they were loaded."""

    def add_to(self, model: PreTrainedModel) -> None:
        """Merge what was loaded as an adapter, and let all weights have gradient."""
        merge_(model)
        model.requires_grad_(True)


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adaptation (Hu et al., arXiv 2106.09685), by the library peft.

    With `quantization="nf4"` it is QLoRA (Dettmers et al., arXiv 2305.14314).

    Args:
        rank: r, the inner size of the two matrices A `[r, in]` and B `[out, r]` of a linear layer.
        alpha: B·A is multiplied by alpha / r, or by alpha / √r with `rslora`.
        dropout: probability at which inputs of A are dropped while training.
        targets: `all-linear`, or names of modules.
        rslora: rank-stabilised scaling (arXiv 2312.03732).
        dtype: of A and B; None takes the base model's.
        lr_factor: the learning rate of the optimizer's config is multiplied by this.
        merge: also save the model with the adapter merged into its weights.
        quantization: `nf4` holds the linear layers of every model of the stage in NF4, see
            `rlt.llm.nf4`; None leaves them as they were loaded.
        double_quantization: the scales of the NF4 weights are quantised too.

    Raises:
        ConfigError: a value is out of its range, or the language-model head is a target.
    """

    rank: int = at_least(1)
    alpha: int = at_least(1)
    dropout: float
    targets: str | Sequence[str]
    rslora: bool
    dtype: Literal["float32", "bfloat16"] | None
    lr_factor: float
    merge: bool
    quantization: Literal["nf4"] | None
    double_quantization: bool

    def __post_init__(self) -> None:
        errors = field_errors(LoRA, vars(self))
        if not self.lr_factor > 0:
            errors.append(f"lr_factor={self.lr_factor}: must be above 0")
        if not 0 <= self.dropout < 1:
            errors.append(f"dropout={self.dropout}: must be at least 0 and below 1")
        if isinstance(self.targets, str) and self.targets != "all-linear":
            errors.append(
                f"targets={self.targets}: give all-linear, or a list of module names such as "
                "[q_proj, v_proj]"
            )
        elif not isinstance(self.targets, str) and _HEAD in self.targets:
            errors.append(
                f"targets: {_HEAD} takes no adapter, because log-probs are computed from its "
                "weight in chunks; leave it out"
            )
        if self.quantization and not nf4.is_installed():
            errors.append(f"quantization={self.quantization}: {nf4.MISSING}")
        raise_if_any([f"adapter.{error}" for error in errors])

    def prepare(self, model: PreTrainedModel) -> None:
        """Hold the linear layers of a loaded model in NF4, if `quantization` says so.

        Raises:
            ValueError: bitsandbytes is not installed, or the model has an adapter that was trained
                on other weights.
        """
        if self.quantization is None or nf4.is_in_nf4(model):
            return
        if adapter_modules(model):
            raise ValueError(
                "adapter.quantization=nf4: the model was loaded with an adapter whose base is not "
                "in NF4; set it to null, or load a merged model"
            )
        nf4.hold_in_nf4_(model, self.double_quantization)

    def add_to(self, model: PreTrainedModel) -> None:
        """Add A and B to every target; an adapter that the model was loaded with is trained on.

        Raises:
            ValueError: no module has one of the names, or the loaded adapter is of another shape.
        """
        from peft import LoraConfig

        loaded = adapter_config(model)
        if loaded is not None:
            _require_same(self, loaded)
        else:
            targets = self.targets if isinstance(self.targets, str) else list(self.targets)
            freeze(model)
            config = LoraConfig(
                r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout,
                target_modules=targets, use_rslora=self.rslora, task_type="CAUSAL_LM",
                exclude_modules=[_HEAD],
            )  # fmt: skip
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # on tied embeddings, which are no targets
                    model.add_adapter(config, adapter_name=_NAME)
            except ValueError as error:
                raise ValueError(f"adapter.targets={self.targets}: {error}") from error
            model.peft_config[_NAME].base_model_name_or_path = _base_name(model)
        dtype = model.dtype if self.dtype is None else getattr(torch, self.dtype)
        for parameter in adapter_parameters(model):
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(True)


def _base_name(model: PreTrainedModel) -> str:
    """Hub id or absolute path of a model, by which its adapter will find it."""
    name = str(model.config._name_or_path)
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def _require_same(lora: LoRA, loaded: Any) -> None:
    """Training goes on with an adapter of the shape that the config names, or not at all."""
    for key, own, theirs in (
        ("rank", lora.rank, loaded.r),
        ("alpha", lora.alpha, loaded.lora_alpha),
        ("rslora", lora.rslora, loaded.use_rslora),
    ):
        if own != theirs:
            raise ValueError(
                f"adapter.{key}={own}: the model was loaded with an adapter whose {key} is "
                f"{theirs}, and training goes on with that; give the same, or load a merged model"
            )


# --- what a model has ----------------------------------------------------------------------------


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
    return model.peft_config[_NAME] if adapter_modules(model) else None  # type: ignore[index]


def is_partly_trained(model: nn.Module) -> bool:
    """Whether some of the weights are not trained."""
    return any(not p.requires_grad for p in model.parameters())


# --- sharing -------------------------------------------------------------------------------------


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


# --- merging and saving --------------------------------------------------------------------------


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
            plain.weight.data += module.get_delta_weight(_NAME).detach()
            module.base_layer = plain
        else:
            module.merge()
    remove_(model)
    nf4.hold_plainly_(model)


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
        model.load_adapter(str(folder), adapter_name=_NAME)
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
