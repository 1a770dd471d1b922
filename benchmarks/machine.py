"""The machine of a run: what it is, how fast it multiplies and reads, what a process has taken."""

import datetime
import functools
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from rlt.llm.flop_count import matmul_flops_per_second
from rlt.runs.environment import git_revision, peak_memory_bytes

_PACKAGES = ("rlt", "torch", "transformers", "lightning", "accelerate", "trl")
_READ_BYTES = 2**28  # more than any cache holds
_READ_SECONDS = 0.3


def machine_facts(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What the figures were measured on, and how fast it multiplies and reads in this run."""
    cuda = device.type == "cuda"
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "matmul_flops_per_second": matmul_flops_per_second(device, dtype),
        "read_bytes_per_second": read_bytes_per_second(device),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in _PACKAGES},
        "git": git_revision(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def installed(package: str) -> str | None:
    """Return the version of an installed package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@functools.cache
def read_bytes_per_second(device: torch.device) -> float:
    """The best rate of reading a block of memory that no cache holds, measured once."""
    block = torch.ones(_READ_BYTES // 4, device=device)
    best, end = float("inf"), time.perf_counter() + _READ_SECONDS
    while best == float("inf") or time.perf_counter() < end:
        started = time.perf_counter()
        block.sum().item()
        best = min(best, time.perf_counter() - started)
    return _READ_BYTES / best


def peak_bytes() -> int:
    """Peak resident memory of this process, or of its GPU where it uses one."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return peak_memory_bytes()
