"""Token budgets that give way: what does not fit into memory is done again in smaller parts."""

import gc
import logging
from collections.abc import Callable, Iterator
from typing import Any, Self, TypeVar

import torch

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Cut = Callable[[int], list[list[int]]]  # from a token budget to the row indices of micro-batches

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


class Attempt:
    """One attempt at some work, as a context that takes in an out-of-memory error of its block.

    Args:
        tokens: the token budget of this attempt.
        cut: the micro-batches that a token budget makes of the rows.

    Attributes:
        shortage: the first line of the out-of-memory error that ended the attempt; None if it
            succeeded.
    """

    def __init__(self, tokens: int, cut: Cut) -> None:
        self.tokens = tokens
        self.cut = cut
        self.shortage: str | None = None

    @property
    def micro_batches(self) -> list[list[int]]:
        """Row indices of each micro-batch of this attempt."""
        return self.cut(self.tokens)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if error is None or not is_out_of_memory(error):
            return False
        self.shortage = str(error).strip().partition("\n")[0] or type(error).__name__
        return True


class TokenBudget:
    """How many padded tokens a model is given at once; lowered, for good, where they do not fit.

    Args:
        tokens: to begin with.
        setting: the option they come from, for messages.
    """

    def __init__(self, tokens: int, setting: str) -> None:
        self.tokens = tokens
        self.setting = setting

    def attempts(self, cut: Cut) -> Iterator[Attempt]:
        """Attempts at this budget, then at the half, quarter, … of it, until one succeeds.

            for attempt in budget.attempts(cut):
                with attempt:
                    for indices in attempt.micro_batches: ...

        The work begins again in each attempt. Before the next attempt, memory is freed and random
        numbers are set back to where they stood. So the result is that of a lower budget from the
        start, if an attempt leaves nothing behind that the next one does not overwrite. Tensors
        that variables outside the block still name are not freed.

        Args:
            cut: the micro-batches that a budget makes of the same rows. A budget that cuts them
                just as one that was too large is passed over.

        Raises:
            OutOfMemoryError: no lower budget cuts the rows into smaller micro-batches.
        """
        random_state = _random_state()
        while True:
            attempt = Attempt(self.tokens, cut)
            yield attempt
            if attempt.shortage is None:
                return
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            self._lower(cut, attempt.shortage)
            _restore_random_state(random_state)

    def fit(self, work: Callable[[int], Result], cut: Cut) -> Result:
        """What `work` returns in the first of the `attempts` that succeeds.

        Args:
            work: takes a token budget.
            cut: see `attempts`.

        Raises:
            OutOfMemoryError: no lower budget cuts the rows into smaller micro-batches.
        """
        for attempt in self.attempts(cut):
            with attempt:
                result = work(attempt.tokens)
        return result

    def _lower(self, cut: Cut, reason: str) -> None:
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
