"""A token budget that is lowered when memory runs out. The work is then redone in smaller parts."""

import gc
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# Some allocators raise a plain RuntimeError. These texts in its message mean that memory ran out.
_MESSAGES = (
    "out of memory",  # CUDA, HIP, MPS
    "can't allocate memory",  # torch on a CPU
    "not enough memory",  # the same on Windows
    "bad_alloc",  # libraries in C++
    "ALLOC_FAILED",  # cuBLAS
)


class OutOfMemoryError(ValueError):
    """Some work does not fit into memory, even one row at a time."""


class TokenBudget:
    """The number of padded tokens that a model is given at once.

    The budget is lowered when memory runs out, and stays lowered.

    Args:
        tokens: the initial budget.
        setting: the config option that it comes from, for messages.

    Attributes:
        tokens: the current budget.
    """

    def __init__(self, tokens: int, setting: str) -> None:
        self.tokens = tokens
        self.setting = setting

    def fit(self, work: Callable[[int], Result], cut: Callable[[int], Any]) -> Result:
        """Call `work` with the budget, and with half, a quarter, … of it until it fits into memory.

        An attempt that ran out of memory leaves no trace: its tensors are freed, and the random
        number generators are set back. The result is therefore the same as with the lower budget
        from the start, provided that the next attempt overwrites everything that `work` stores
        elsewhere.

        Args:
            work: the work to do; it takes a token budget.
            cut: takes a token budget and returns the micro-batches that `work` makes with it. A
                budget is skipped if it gives the same micro-batches as the one that was too large.

        Returns:
            What `work` returns.

        Raises:
            OutOfMemoryError: memory ran out and no lower budget gives smaller micro-batches.
        """
        random_state = _random_state()
        while True:
            try:
                return work(self.tokens)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
            # Inside `except`, the traceback would keep the tensors of the attempt alive.
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            self._lower(cut, reason)
            _restore_random_state(random_state)

    def _lower(self, cut: Callable[[int], Any], reason: str) -> None:
        too_large = cut(self.tokens)
        lower = self.tokens
        while cut(lower) == too_large:
            lower //= 2
            if lower < 1:
                raise OutOfMemoryError(
                    f"not enough memory ({reason}), even for one row at a time: shorten the rows "
                    "(rollout.max_new_tokens, data.max_tokens), train with "
                    "hardware.gradient_checkpointing=true, or choose a smaller model or another "
                    "hardware profile (hardware=…)"
                )
        log.warning(
            "not enough memory for %s=%d (%s): the run continues as with %s=%d from the start; set "
            "that value to spare the next run the failed attempt",
            self.setting, self.tokens, reason, self.setting, lower,
        )  # fmt: skip
        self.tokens = lower


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the memory of the device or of the machine ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


def _random_state() -> tuple[Any, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda


def _restore_random_state(state: tuple[Any, Any]) -> None:
    cpu, cuda = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
