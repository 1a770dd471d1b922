"""Importance weights for completions that were drawn with other probabilities than the policy's.

A rollout engine may compute in another precision, or with older weights, than the policy that
learns from its completions. An expectation over the policy's completions is then one over the
engine's completions in which each token counts for w = policy / sampler. Truncated importance
sampling (tis) bounds w from above (Ionides 2008). Masked importance sampling (mis) leaves
out the tokens whose w is below 1 / cap or above cap; they do not count in any mean of the loss.

Shapes: T token of a completion.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlt.training.algorithms import MAX_LOG_RATIO, Correction


def importance_weights(ratio_T: Tensor, correction: Correction, cap: float) -> Tensor:
    """What the loss of each token is multiplied by; exactly 0 where a token is left out.

    Args:
        ratio_T: probability under the policy, divided by that under the sampler.
        correction: see conf/algorithm/grpo.yaml.
        cap: the largest weight; `mis` also leaves out what lies below its inverse.
    """
    if correction == "none":
        return torch.ones_like(ratio_T)
    if correction == "tis":
        return ratio_T.clamp(max=cap)
    inside_T = (ratio_T >= 1 / cap) & (ratio_T <= cap)
    return ratio_T.where(inside_T, 0.0)


def sampler_ratios(
    log_probs: Sequence[Tensor], sampler_log_probs: Sequence[Tensor]
) -> list[Tensor]:
    """Policy's over sampler's probability of every token, one vector `[T]` a completion.

    Args:
        log_probs: of each completion's tokens under the policy, in nats.
        sampler_log_probs: the same under the engine that drew them.
    """
    return [
        (own_T - sampler_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        for own_T, sampler_T in zip(log_probs, sampler_log_probs, strict=True)
    ]


def mismatch(ratios: Sequence[Tensor], cap: float) -> dict[str, float]:
    """How far the sampler was from the policy.

    Args:
        ratios: policy's over sampler's probability of the tokens of each completion.
        cap: the bound of the correction.

    Returns:
        `kl`: KL(sampler ‖ policy) in nats a token, estimated by w - 1 - log w; `max_ratio`: the
        largest of w and 1 / w; `outside_rate`: fraction of tokens with w outside [1 / cap, cap].
    """
    ratio_N = torch.cat(list(ratios)).double()
    largest_N = torch.maximum(ratio_N, 1 / ratio_N)
    return {
        "kl": float((ratio_N - 1 - ratio_N.log()).mean()),
        "max_ratio": float(largest_N.max()),
        "outside_rate": float((largest_N > cap).double().mean()),
    }
