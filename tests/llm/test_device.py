"""What a process is told about its machine."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlt.llm.device import Hardware, keep_freed_memory

_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_HUGE_PAGES = _THP.is_file() and "[always]" in _THP.read_text()
_GLIBC = platform.libc_ver()[0] == "glibc"

# Pages that are mapped anew while a tensor of 64 MiB is made and freed forty times.
_FAULTS = """
import resource, sys, torch
from rlt.llm.device import Hardware, keep_freed_memory
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


@pytest.mark.skipif(not _GLIBC, reason="only glibc's malloc is told to")
@pytest.mark.skipif(_HUGE_PAGES, reason="a tensor takes few, huge pages")
def test_freed_memory_is_used_again() -> None:
    # How often malloc still asks the system depends on how the heap came to lie.
    assert faults("kept") < faults("as it comes") / 2


def test_whoever_has_set_malloc_up_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert not keep_freed_memory()


def hardware(accelerator: str, threads: int | None = None) -> Hardware:
    return Hardware(
        accelerator=accelerator, devices=1, num_nodes=1, strategy="auto", precision="32-true",
        dtype="float32", attention="sdpa", tokens_per_micro_batch=1, generation_token_budget=1,
        gradient_checkpointing=False, memory_gb=None, threads=threads,
    )  # fmt: skip


def test_the_cpu_alone_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    monkeypatch.setattr("rlt.llm.device.keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setenv("TRANSFORMERS_SDPA_FORCE_GQA", "")
    monkeypatch.delenv("TRANSFORMERS_SDPA_FORCE_GQA")
    hardware("gpu").prepare()
    assert not kept and "TRANSFORMERS_SDPA_FORCE_GQA" not in os.environ
    hardware("cpu").prepare()
    assert kept and os.environ["TRANSFORMERS_SDPA_FORCE_GQA"] == "1"
    monkeypatch.setenv("TRANSFORMERS_SDPA_FORCE_GQA", "0")  # set by the user
    hardware("cpu").prepare()
    assert os.environ["TRANSFORMERS_SDPA_FORCE_GQA"] == "0"


def test_threads_and_device() -> None:
    before = torch.get_num_threads()
    try:
        hardware("cpu", threads=before + 1).prepare()
        assert torch.get_num_threads() == before + 1
        hardware("cpu").prepare()
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert hardware("gpu").device.type == "cuda" and hardware("mps").device.type == "mps"
