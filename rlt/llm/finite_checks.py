"""Checks that stop a run at the first NaN or infinity, before anything is trained on it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_SHOWN = 5  # problems named in a message


class NotFiniteError(ValueError):
    """A number that the run depends on is NaN or infinite.

    Args:
        what: which number it is, with its value ("the reward is nan").
        problems: ids of the problems that the number belongs to; empty if they are not known.
        step: the step at which it occurred; empty if it is not known.
    """

    def __init__(self, what: str, problems: Sequence[str] = (), step: str = "") -> None:
        self.what, self.problems = what, list(dict.fromkeys(problems))
        shown = ", ".join(self.problems[:_SHOWN])
        more = len(self.problems) - _SHOWN
        which = f" (problems: {shown}{f' and {more} more' if more > 0 else ''})" if shown else ""
        where, kept = (f"{step}: ", "no optimizer step was taken on it. ") if step else ("", "")
        super().__init__(
            f"{where}{what}{which}; {kept}Lower optim.lr, compute in a higher precision "
            "(hardware.precision=32-true, hardware.dtype=float32), or look at these problems and "
            "at the last samples and reward terms"
        )


def require_finite(
    what: str, values: Sequence[float] | Sequence[Tensor], problems: Sequence[str]
) -> None:
    """Check that the value of every row is finite.

    Args:
        what: name of the values, for the message.
        values: one number, or one tensor of numbers, for each row.
        problems: the id of each row's problem.

    Raises:
        NotFiniteError: a number is NaN or infinite as a float32.
    """
    tensors = [torch.as_tensor(value, dtype=torch.float32).flatten() for value in values]
    # All rows are checked at once first, because every check waits for the device.
    if not tensors or torch.cat(tensors).isfinite().all():
        return
    bad = [n for n, tensor in enumerate(tensors) if not tensor.isfinite().all()]
    numbers = tensors[bad[0]]
    raise NotFiniteError(
        f"{what} is {float(numbers[~numbers.isfinite()][0])}", [problems[n] for n in bad]
    )


def require_finite_sum(what: str, value: float, problems: Sequence[str]) -> None:
    """Check that one number, to which all of the problems contribute, is finite.

    Raises:
        NotFiniteError: the number is NaN or infinite. The message names all of the problems.
    """
    if not math.isfinite(value):
        raise NotFiniteError(f"{what} is {value}", problems)
