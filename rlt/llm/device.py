"""What the process is told about the machine that the config names, before anything is computed."""

import ctypes
import os
import platform

import torch
from omegaconf import DictConfig

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def device_of(cfg: DictConfig) -> torch.device:
    """The device that stages without a Trainer run on."""
    accelerator = cfg.hardware.accelerator
    if accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available()):
        return torch.device("cuda")
    return torch.device("mps" if accelerator == "mps" else "cpu")


def prepare(cfg: DictConfig) -> None:
    """Set torch's threads and, where models run on the CPU, what makes them faster there."""
    if cfg.hardware.threads is not None:
        torch.set_num_threads(cfg.hardware.threads)
    if device_of(cfg).type == "cpu":
        keep_freed_memory()
        # Query heads that share a key head use it as it is, where transformers would copy it for
        # each of them as soon as a row is padded. Only torch's CPU kernels take both.
        os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")


def keep_freed_memory() -> bool:
    """Let malloc keep large freed blocks for the next tensor instead of handing them back.

    Handed back, every page of every large tensor is mapped and zeroed by the kernel anew, at each
    step: up to a third of an update's time. A process then stays as large as it has once been.
    Whoever has set one of glibc's MALLOC_... variables is left alone.

    Returns:
        Whether it was done; other C libraries are left as they are.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1))
