"""A token budget that is halved until the work fits into memory."""

import logging
import weakref

import pytest
import torch
from torch import Tensor

from rlt.llm.batching import cut_rows
from rlt.llm.token_budget import OutOfMemoryError, TokenBudget, is_out_of_memory

LENGTHS = [3, 9, 5, 5, 7, 1, 4, 6]
ROWS = [([1, 2], list(range(length))) for length in LENGTHS]


def cut(tokens: int) -> list[list[int]]:
    return cut_rows(ROWS, tokens, shared=False)


def test_a_budget_is_halved_until_the_work_fits_and_stays(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tried = []

    def work(tokens: int) -> Tensor:
        tried.append(tokens)
        drawn = torch.rand(2)
        if max(len(batch) for batch in cut(tokens)) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nLong story")
        return drawn

    budget = TokenBudget(4096, "hardware.tokens_per_micro_batch")
    torch.manual_seed(0)
    drawn = budget.fit(work, cut)
    # With 4096, 2048 … 128 all rows fit into one batch, so only the first of them is tried.
    assert tried == [4096, 64, 32, 16]
    assert budget.tokens == 16
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(2))  # the failed attempts left the random state unchanged
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3
    assert "for hardware.tokens_per_micro_batch=64 (CUDA out of memory. Tried to" in caplog.text
    assert "as with hardware.tokens_per_micro_batch=16 from the start" in caplog.text
    assert "Long story" not in caplog.text
    caplog.clear()
    budget.fit(work, cut)
    assert tried[4:] == [16]
    assert not caplog.records


def test_a_loop_over_micro_batches_is_begun_again_with_smaller_ones() -> None:
    budget = TokenBudget(4096, "hardware.tokens_per_micro_batch")
    for attempt in budget.attempts(cut):
        with attempt:
            done = []
            for indices in attempt.micro_batches:
                if len(indices) > 2:
                    raise MemoryError
                done.append(indices)
    assert done == cut(16) and budget.tokens == attempt.tokens == 16
    assert attempt.shortage is None


def test_nothing_is_left_to_halve() -> None:
    tried = []

    def work(tokens: int) -> None:
        tried.append(tokens)
        raise MemoryError

    with pytest.raises(
        OutOfMemoryError, match=r"\(MemoryError\), even for one row at a time"
    ) as error:
        TokenBudget(64, "hardware.tokens_per_micro_batch").fit(work, cut)
    assert all(len(batch) == 1 for batch in cut(tried[-1]))
    for remedy in ("max_new_tokens", "max_tokens", "gradient_checkpointing", "model", "hardware=…"):
        assert remedy in str(error.value)


def test_a_failed_attempt_has_freed_its_tensors_before_the_next() -> None:
    kept: list[weakref.ref[Tensor]] = []

    def work(tokens: int) -> bool:
        assert all(one() is None for one in kept)
        large = torch.zeros(tokens)
        kept.append(weakref.ref(large))
        if len(cut(tokens)[0]) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return True

    assert TokenBudget(4096, "setting").fit(work, cut)
    assert len(kept) > 2


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("any words"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: "
                      "can't allocate memory: you tried to allocate 4 bytes."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)  # fmt: skip
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_a_real_allocation_that_is_refused_counts() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert is_out_of_memory(error.value)


def test_other_errors_pass_through() -> None:
    def work(tokens: int) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        TokenBudget(64, "setting").fit(work, cut)
