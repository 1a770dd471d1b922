"""Chooses the device and prepares the process for the hardware that the config names."""

import ctypes
import gc
import os
import platform
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from rlt.config.allowed_targets import raise_if_any
from rlt.config.fields import at_least, field_errors
from rlt.runs import ranks

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


Model = TypeVar("Model", bound=nn.Module)


def on_device(model: Model, device: torch.device) -> Model:
    """Move a model to a device and return it.

    It calls `model.to(device)`, which the annotation of `PreTrainedModel.to` does not allow.
    """
    return model.to(device)


@dataclass(kw_only=True)
class Hardware:
    """What the machine can hold, and how Lightning drives it (`conf/hardware/`).

    Args:
        tokens_per_micro_batch: padded tokens of one forward and backward pass; `auto`: as many as
            the free memory holds, which a run finds out when it begins (`rlt.preflight.budget`).
        generation_token_budget: padded tokens of one batch of sampling.
        memory_gb: memory of the device in GiB, for the plan; None: asked of the device.
        threads: of torch on a CPU; None: torch's own choice.
        The others are Lightning's, or transformers', arguments of the same name.

    Raises:
        ConfigError: a value is out of its range.
    """

    accelerator: str
    devices: Any
    num_nodes: int = at_least(1)
    strategy: Any
    precision: Literal[
        "32-true", "32", "bf16-mixed", "bf16-true", "bf16", "64-true", "64",
        "16-mixed", "16-true", "16",
    ]  # fmt: skip
    dtype: Literal["float32", "bfloat16", "float16", "auto"]
    attention: str
    tokens_per_micro_batch: int | Literal["auto"] = at_least(1)
    generation_token_budget: int = at_least(1)
    gradient_checkpointing: bool
    memory_gb: float | None
    threads: int | None = at_least(1)

    def __post_init__(self) -> None:
        self.precision = str(self.precision)  # type: ignore[assignment]
        errors = field_errors(Hardware, vars(self))
        if self.memory_gb is not None and self.memory_gb <= 0:
            errors.append(f"memory_gb={self.memory_gb}: must be above 0, or null")
        raise_if_any([f"hardware.{error}" for error in errors])

    @property
    def micro_batch_tokens(self) -> int:
        """`tokens_per_micro_batch` as a number.

        Raises:
            ValueError: it is `auto`, and no run has found the number yet.
        """
        if self.tokens_per_micro_batch == "auto":
            raise ValueError(
                "hardware.tokens_per_micro_batch=auto: only a run or its plan finds the number"
            )
        return self.tokens_per_micro_batch

    @property
    def shards(self) -> int:
        """Number of ranks that the trained weights are divided among; 1 if they are not."""
        return ranks.devices_of(self) * self.num_nodes if self.strategy == "fsdp" else 1

    @property
    def device(self) -> torch.device:
        """The device that stages without a Trainer run on."""
        gpu = self.accelerator in ("gpu", "cuda")
        if gpu or (self.accelerator == "auto" and torch.cuda.is_available()):
            return torch.device("cuda")
        return torch.device("mps" if self.accelerator == "mps" else "cpu")

    def require_device(self) -> None:
        """Raises ValueError when a GPU is asked for and there is none."""
        if self.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
            raise ValueError(
                f"hardware.accelerator={self.accelerator}: torch {torch.__version__} sees no CUDA "
                "device; choose hardware=cpu, or install torch's CUDA build and its driver"
            )
        if self.accelerator == "mps" and not torch.backends.mps.is_available():
            raise ValueError(
                f"hardware.accelerator=mps: torch {torch.__version__} sees no Apple GPU; choose "
                "hardware=cpu"
            )

    def prepare(self) -> None:
        """Set torch's threads and, where models run on the CPU, what makes them faster there."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        if self.device.type == "cpu":
            keep_freed_memory()
            # With grouped-query attention, transformers copies each key head for all query heads
            # that share it as soon as a row is padded. This option avoids the copies. Only torch's
            # CPU kernels accept shared heads together with a mask.
            os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")


def return_freed_memory() -> None:
    """Give what a finished step of a pipeline has freed back to the operating system.

    Nothing else does, once `keep_freed_memory` has been called. It does nothing where the C library
    is not glibc.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> bool:
    """Let malloc keep large freed blocks for the next tensor instead of returning them.

    If freed blocks are returned to the operating system, the kernel has to map and zero every page
    of every large tensor anew at each step. That takes up to a third of the time of an update. The
    price is that the process stays as large as it has been at its peak.

    Returns:
        Whether malloc was changed. It is left as it is if the C library is not glibc, and if one of
        glibc's MALLOC_... environment variables is set, because the user has then tuned it.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1))
