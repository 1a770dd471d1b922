"""LoRA adapters: which weights of a model are trained.

An adapter is added to a Hugging Face model in place, by the model's own `add_adapter`, so the model
keeps its class. All that samples from it or takes its log-probs works as before.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from transformers import PreTrainedModel

from rlt.config.allowed_targets import raise_if_any
from rlt.config.fields import at_least, field_errors
from rlt.llm import nf4
from rlt.llm.adapter_layers import (
    ADAPTER_NAME,
    adapter_config,
    adapter_modules,
    adapter_parameters,
    merge_,
)
from rlt.llm.models import freeze

_HEAD = "lm_head"


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
                    model.add_adapter(config, adapter_name=ADAPTER_NAME)
            except ValueError as error:
                raise ValueError(f"adapter.targets={self.targets}: {error}") from error
            model.peft_config[ADAPTER_NAME].base_model_name_or_path = _base_name(model)
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
