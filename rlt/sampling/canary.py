"""Whether a rollout server samples from the weights that it should: a comparison of log-probs.

A server draws a few tokens after a fixed prompt, and the model gives its own log-probs of them. Two
things betray a server whose weights are not the model's, even where they differ by one small step:

- It drew what it drew before, and its log-probs are nearer to those that the model gave then. It
  was left behind.
- It is further from the model than rounding explains, which its first canary has shown. Some of its
  weights are others, or keys and values of earlier weights are in its prefix cache.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlt.sampling.vllm_server import RolloutServerError

_LEAST_ROUNDING = 1e-5  # nats a token: sums of float32 in another order
_ROUNDINGS = 20  # times a server's first difference that later ones may reach


class Canary:
    """Compares servers with the model.

    Args:
        bound: largest mean difference, in nats a token, that is ever taken for rounding.
    """

    def __init__(self, bound: float) -> None:
        self.bound = bound
        self._rounding: dict[str, float] = {}  # by server
        # By server: the last tokens, and their log-probs under the model of that time.
        self._last: dict[str, tuple[list[int], Tensor]] = {}

    def require_same(
        self, server: str, version: str, ids: list[int], theirs: Sequence[float], ours_T: Tensor
    ) -> None:
        """Check a server's log-probs of the tokens that it drew.

        Args:
            server: its address.
            version: name of the weights that it should have.
            ids: the T tokens.
            theirs: the server's log-probs of them, in nats.
            ours_T: the model's.

        Raises:
            RolloutServerError: they are not those of the model's weights.
        """
        difference = mean_difference(ours_T, theirs)
        rounding = self._rounding.get(server, max(difference, _LEAST_ROUNDING))
        bound = min(self.bound, _ROUNDINGS * rounding)
        last_ids, before_T = self._last.get(server, ([], ours_T))
        left_behind = ids == last_ids and mean_difference(before_T, theirs) < 0.5 * difference
        if left_behind or not difference <= bound:
            raise RolloutServerError(
                f"{server} does not sample from the weights {version}"
                f"{', but from earlier ones' if left_behind else ''}: the log-probs of its tokens "
                f"are {_shown(theirs)}, the model's {_shown(ours_T.tolist())}, {difference:.3g} "
                f"nats a token apart, and {bound:.3g} may pass for rounding ({_ROUNDINGS} times "
                f"the first canary's, at most rollout.canary_bound={self.bound})"
            )
        self._rounding[server] = rounding
        self._last[server] = ids, ours_T


def mean_difference(ours_T: Tensor, theirs: Sequence[float]) -> float:
    """In nats a token; infinite where the numbers of tokens differ, or there are none."""
    if len(ours_T) != len(theirs) or not theirs:
        return float("inf")
    return float((ours_T.cpu() - torch.tensor(theirs)).abs().mean())


def _shown(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)
