"""NaN and infinity stop a run where they come up, before anything is trained on them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_SHOWN = 5  # problems named in a message


class NotFiniteError(ValueError):
    """A number that a run goes on from is NaN or infinite.

    Args:
        what: what is, with its value.
        problems: ids of the problems concerned; () if they are not known.
        step: where the run stood.
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
    """Check a number, or a tensor of them, of each row.

    Args:
        what: the numbers' name.
        problems: the id of each row's problem.

    Raises:
        NotFiniteError: a number is NaN or infinite (as a float32).
    """
    tensors = [torch.as_tensor(value, dtype=torch.float32).flatten() for value in values]
    # One look at all of them, as each waits for the device.
    if not tensors or torch.cat(tensors).isfinite().all():
        return
    bad = [n for n, tensor in enumerate(tensors) if not tensor.isfinite().all()]
    numbers = tensors[bad[0]]
    raise NotFiniteError(
        f"{what} is {float(numbers[~numbers.isfinite()][0])}", [problems[n] for n in bad]
    )


def require_finite_sum(what: str, value: float, problems: Sequence[str]) -> None:
    """The same for one number that all of these problems have their part in."""
    if not math.isfinite(value):
        raise NotFiniteError(f"{what} is {value}", problems)
