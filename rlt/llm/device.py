"""Chooses the device and prepares the process for the hardware that the config names."""

import ctypes
import os
import platform
from typing import TypeVar

import torch
from omegaconf import DictConfig
from torch import nn

Model = TypeVar("Model", bound=nn.Module)

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def device_of(cfg: DictConfig) -> torch.device:
    """Return the device that stages without a Lightning Trainer run on."""
    accelerator = cfg.hardware.accelerator
    if accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available()):
        return torch.device("cuda")
    return torch.device("mps" if accelerator == "mps" else "cpu")


def on_device(model: Model, device: torch.device) -> Model:
    """Move a model to a device and return it.

    It calls `model.to(device)`, which the annotation of `PreTrainedModel.to` does not allow.
    """
    return model.to(device)


def prepare(cfg: DictConfig) -> None:
    """Set torch's number of threads and, if models run on the CPU, the options that speed it up."""
    if cfg.hardware.threads is not None:
        torch.set_num_threads(cfg.hardware.threads)
    if device_of(cfg).type == "cpu":
        keep_freed_memory()
        # With grouped-query attention, transformers copies each key head for all query heads that
        # share it as soon as a row is padded. This option avoids the copies. Only torch's CPU
        # kernels accept shared heads together with a mask.
        os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")


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
