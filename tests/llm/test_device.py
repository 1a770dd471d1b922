"""The device and the settings of a process, as the config's hardware group asks for them."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from rlt.llm.device import device_of, keep_freed_memory, prepare

_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_HUGE_PAGES = _THP.is_file() and "[always]" in _THP.read_text()
_GLIBC = platform.libc_ver()[0] == "glibc"

# Counts the page faults while a tensor of 64 MiB is made and freed forty times.
_FAULTS = """
import resource, sys, torch
from rlt.llm.device import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    command = [sys.executable, "-c", _FAULTS, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=clean)
    return int(done.stdout)


@pytest.mark.skipif(not _GLIBC, reason="only glibc's malloc has these settings")
@pytest.mark.skipif(_HUGE_PAGES, reason="a tensor takes few, huge pages")
def test_freed_memory_is_used_again() -> None:
    # The exact number of faults depends on the layout of the heap.
    assert faults("kept") < faults("as it comes") / 2


def test_whoever_has_set_malloc_up_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert not keep_freed_memory()


def config(accelerator: str, threads: int | None = None) -> object:
    return OmegaConf.create({"hardware": {"accelerator": accelerator, "threads": threads}})


def test_the_cpu_alone_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    monkeypatch.setattr("rlt.llm.device.keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setenv("TRANSFORMERS_SDPA_FORCE_GQA", "")
    monkeypatch.delenv("TRANSFORMERS_SDPA_FORCE_GQA")
    prepare(config("gpu"))
    assert not kept
    assert "TRANSFORMERS_SDPA_FORCE_GQA" not in os.environ
    prepare(config("cpu"))
    assert kept
    assert os.environ["TRANSFORMERS_SDPA_FORCE_GQA"] == "1"
    monkeypatch.setenv("TRANSFORMERS_SDPA_FORCE_GQA", "0")  # set by the user
    prepare(config("cpu"))
    assert os.environ["TRANSFORMERS_SDPA_FORCE_GQA"] == "0"


def test_threads_and_device() -> None:
    before = torch.get_num_threads()
    try:
        prepare(config("cpu", threads=before + 1))
        assert torch.get_num_threads() == before + 1
        prepare(config("cpu"))
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert device_of(config("gpu")).type == "cuda"
    assert device_of(config("mps")).type == "mps"
