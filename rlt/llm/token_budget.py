"""Token budgets that give way: what does not fit into memory is done again in smaller parts."""

import gc
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# Not every allocator has an error class of its own; these are what the others say.
_MESSAGES = (
    "out of memory",  # CUDA, HIP, MPS
    "can't allocate memory",  # torch on a CPU
    "not enough memory",  # the same on Windows
    "bad_alloc",  # libraries in C++
    "ALLOC_FAILED",  # cuBLAS
)


class OutOfMemoryError(ValueError):
    """Some work does not fit into memory, in however small parts."""


class TokenBudget:
    """How many padded tokens a model is given at once; lowered, for good, where they do not fit.

    Args:
        tokens: to begin with.
        setting: the option they come from, for messages.
    """

    def __init__(self, tokens: int, setting: str) -> None:
        self.tokens = tokens
        self.setting = setting

    def fit(self, work: Callable[[int], Result], cut: Callable[[int], Any]) -> Result:
        """What `work` returns, given this budget or the half, quarter, … of it that fits.

        An attempt that ran out of memory is forgotten: its tensors are freed, and random numbers
        are drawn again from where they stood. So the result is that of a lower budget from the
        start, if `work` keeps nothing elsewhere that the next attempt does not overwrite.

        Args:
            work: takes a token budget.
            cut: the micro-batches that a budget makes of the same rows; a budget that cuts them
                just as one that was too large is passed over.

        Raises:
            OutOfMemoryError: no lower budget cuts the rows into smaller micro-batches.
        """
        random_state = _random_state()
        while True:
            try:
                return work(self.tokens)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
            # No longer in `except`, where the traceback would keep the attempt's tensors alive.
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
            "not enough memory for %s=%d (%s): going on as with %s=%d from the start; set that to "
            "spare the next run the attempt",
            self.setting, self.tokens, reason, self.setting, lower,
        )  # fmt: skip
        self.tokens = lower


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no memory left, of the device or of the machine."""
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
