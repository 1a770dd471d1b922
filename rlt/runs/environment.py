"""The environment of a run: its code, packages and machine."""

import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from rlt import PACKAGE_DIR, __version__

_PACKAGES = (
    "torch", "lightning", "transformers", "datasets", "hydra-core", "omegaconf", "tokenizers",
    "reasoning-gym", "math-verify",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Return the code, packages and machine of this process, as the manifest records them."""
    return {
        "rlt": __version__,
        "git": git_revision(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "hardware": hardware_metadata(),
    }


@functools.cache
def git_revision() -> str | None:
    """Return the git revision that this package runs from; None outside its own checkout.

    `+changes` is appended if the checkout has uncommitted changes.
    """
    folder = PACKAGE_DIR

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
        return done.stdout.strip()

    try:
        if not Path(git("rev-parse", "--show-toplevel")).samefile(folder.parent):
            return None  # installed below some other project's checkout
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def hardware_metadata() -> dict[str, Any]:
    """Return the platform, the Python version, CPUs, threads of torch, and names of GPUs."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if cuda
        else [],
    }


def peak_memory_bytes() -> int:
    """Return the peak resident memory of this process so far, in bytes.

    On Linux the source is VmHWM, because ru_maxrss also counts the peak of the parent process.
    """
    import resource

    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
    if found:
        return found[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
