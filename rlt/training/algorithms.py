"""Advantages and policy losses of the GRPO family, as pure functions over tensors.

The teacher's update is  loss = sum over tokens of per_token_BT * weights_BT, where per_token_BT
comes from `policy_loss_terms` and weights_BT from `token_weights`, computed once over the whole
optimizer batch. The weights hold every normaliser, so any split into micro-batches adds up to the
same gradient.

The paper trains with GRPO, beta = 0.04 and epsilon = 0.2 (algorithm=grpo); the other variants are
departures. Conventions are those of trl 1.16: unbiased group std plus 1e-4; completions left out by
`mask_overlong` still count as completions; cispo caps the ratio at `epsilon_high` itself, not
at 1 + epsilon_high; k3 is weighted by the importance ratio (the paper's code: plain k3). Unlike in
trl, the batch of "token_mean" is always the whole optimizer batch.

Used by `rlt stage=teacher_rl algorithm=grpo`; the settings are in conf/algorithm/.
Shapes: B completion, T token, P problem, G completion in its group.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Aggregation = Literal["sequence_mean", "token_mean", "max_length"]
Objective = Literal["clip", "cispo"]
Ratio = Literal["token", "sequence"]
Correction = Literal["none", "tis", "mis"]

STD_EPSILON = 1e-4  # added to the group's std
MAX_LOG_RATIO = 20.0  # exp() of more would overflow a loss that is already lost


@dataclass(frozen=True)
class Algorithm:
    """The settings of a policy update; conf/algorithm/grpo.yaml explains each."""

    aggregation: Aggregation
    objective: Objective
    ratio: Ratio
    epsilon_low: float | None
    epsilon_high: float
    beta: float
    importance_weighted_k3: bool
    scale_rewards: bool
    negative_weight: float
    mask_overlong: bool
    correction: Correction
    correction_cap: float
    num_iterations: int
    minibatches: int
    reference_update_every_steps: int | None
    reference_mix_up: float

    def __post_init__(self) -> None:
        for name, literal in (
            ("aggregation", Aggregation),
            ("objective", Objective),
            ("ratio", Ratio),
            ("correction", Correction),
        ):
            allowed = get_args(literal)
            self._require(name, getattr(self, name) in allowed, f"one of {', '.join(allowed)}")
        for name in ("importance_weighted_k3", "scale_rewards", "mask_overlong"):
            self._require(name, isinstance(getattr(self, name), bool), "true or false")
        for name in ("num_iterations", "minibatches"):
            self._require(name, _is_count(getattr(self, name)), "a whole number of at least 1")
        if self.objective == "cispo":
            self._require(
                "epsilon_low", self.epsilon_low is None, "null: objective=cispo has no lower bound"
            )
            self._require(
                "epsilon_high",
                self.epsilon_high >= 1,
                "at least 1: it is the cap of the ratio for objective=cispo, e.g. 5.0",
            )
        else:
            low = self.epsilon_low
            self._require("epsilon_low", low is not None and 0 <= low < 1, "in [0, 1), e.g. 0.2")
            self._require("epsilon_high", self.epsilon_high >= 0, "at least 0, e.g. 0.2")
        self._require(
            "negative_weight",
            0 <= self.negative_weight <= 1,
            "between 0 (learn from what is better than its group alone) and 1",
        )
        self._require(
            "correction_cap", self.correction_cap > 1, "above 1, the ratio of two equal log-probs"
        )
        self._require(
            "correction",
            self.correction == "none" or self.ratio == "token",
            "none with ratio=sequence: it weighs tokens, which then share one ratio",
        )
        self._require("beta", self.beta >= 0, "at least 0 (0 switches k3 off)")
        every = self.reference_update_every_steps
        self._require(
            "reference_update_every_steps",
            every is None or _is_count(every),
            "a whole number of at least 1, or null to keep the reference fixed",
        )
        self._require(
            "reference_mix_up",
            0 < self.reference_mix_up <= 1,
            "in (0, 1] (1 replaces the reference by the policy)",
        )

    def _require(self, name: str, holds: bool, constraint: str) -> None:
        if not holds:
            value = getattr(self, name)
            raise ValueError(f"algorithm.{name}={value!r}, but it must be {constraint}")

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads reference log-probs."""
        return self.beta > 0

    @property
    def optimizer_steps_per_rollout(self) -> int:
        """Optimizer steps on one rollout: iterations × minibatches."""
        return self.num_iterations * self.minibatches

    @property
    def needs_old_log_probs(self) -> bool:
        """Whether the policy that is updated differs from the one that sampled, after step one."""
        return self.optimizer_steps_per_rollout > 1

    def moves_reference_after(self, optimizer_steps: int) -> bool:
        """Whether the reference moves once `optimizer_steps` steps (counted from 1) are done."""
        every = self.reference_update_every_steps
        return every is not None and optimizer_steps > 0 and optimizer_steps % every == 0


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def group_advantages(rewards_PG: Tensor, scale: bool) -> Tensor:
    """Reward minus its group's mean, divided by the group's unbiased std + 1e-4 if `scale`.

    A group whose rewards are all equal teaches nothing: its advantages are exactly zero.
    """
    if rewards_PG.ndim != 2 or rewards_PG.shape[1] < 2:
        raise ValueError(
            f"rewards have shape {tuple(rewards_PG.shape)}, expected [problems, completions] with "
            "at least 2 completions per problem; raise the number of completions per problem"
        )
    finite_PG = rewards_PG.isfinite()
    if not bool(finite_PG.all()):
        bad = [tuple(index) for index in (~finite_PG).nonzero().tolist()]
        shown = ", ".join(
            f"{rewards_PG[p, g].item()} at (problem {p}, completion {g})" for p, g in bad[:5]
        )
        raise ValueError(
            f"{len(bad)} of {rewards_PG.numel()} rewards are not finite: {shown}; every reward "
            "must be a number: look at the terms of these completions"
        )
    advantages_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    if scale:
        advantages_PG = advantages_PG / (rewards_PG.std(dim=1, keepdim=True) + STD_EPSILON)
    equal_P1 = rewards_PG.amax(dim=1, keepdim=True) == rewards_PG.amin(dim=1, keepdim=True)
    return advantages_PG.masked_fill(equal_P1, 0.0)


def loss_mask(mask_BT: Tensor, overlong_B: Tensor, algorithm: Algorithm) -> Tensor:
    """The completion mask, without the completions that were cut by length if so configured."""
    keep_BT = mask_BT.bool()
    return keep_BT & ~overlong_B.bool().unsqueeze(1) if algorithm.mask_overlong else keep_BT


def token_weights(mask_BT: Tensor, aggregation: Aggregation, max_completion_tokens: int) -> Tensor:
    """What each token's loss counts for, to be computed once over the whole optimizer batch."""
    weights_BT = mask_BT.to(torch.float32)
    completions = mask_BT.shape[0]
    tokens_B1 = weights_BT.sum(dim=1, keepdim=True)
    if aggregation == "sequence_mean":
        return weights_BT / tokens_B1.clamp(min=1) / completions
    if aggregation == "token_mean":
        return weights_BT / tokens_B1.sum().clamp(min=1)
    assert aggregation == "max_length", aggregation
    longest = int(tokens_B1.max())
    if longest > max_completion_tokens:
        raise ValueError(
            f"max_completion_tokens={max_completion_tokens}, but a completion has {longest} "
            "tokens; aggregation=max_length needs the limit that the completions were sampled with"
        )
    return weights_BT / (completions * max_completion_tokens)


@dataclass(frozen=True)
class LossTerms:
    """Per-token loss with gradient, and what there is to watch, detached; zero where masked.

    With ratio=sequence each token of a completion carries the ratio of its completion.
    """

    per_token_BT: Tensor
    ratio_BT: Tensor
    clipped_low_BT: Tensor  # bool: the ratio fell below the trust region and gets no gradient
    clipped_high_BT: Tensor  # bool: it rose above it (cispo: it was capped, and keeps its gradient)
    k1_BT: Tensor  # old - policy, the sampled log-ratio
    k3_BT: Tensor  # exp(d) - d - 1 with d = policy - old: KL(old || policy), tokens from old
    reference_k3_BT: Tensor | None  # exp(d) - d - 1 with d = reference - policy


def policy_loss_terms(
    log_probs_BT: Tensor,
    old_log_probs_BT: Tensor | None,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    algorithm: Algorithm,
    reference_log_probs_BT: Tensor | None = None,
) -> LossTerms:
    """The loss of each token, to be weighted by `token_weights` and summed.

    `advantages_BT` holds one number a token, or `[B, 1]`, one a completion (see
    `rlt.training.credit`). Without `old_log_probs_BT` the update is on-policy: the policy's own are
    used, detached. Whatever the masked positions hold, NaN included, is ignored.
    """
    if algorithm.needs_reference and reference_log_probs_BT is None:
        raise ValueError(
            f"algorithm.beta={algorithm.beta} needs the reference's log-probs, but none were "
            "given; pass reference_log_probs_BT or set algorithm.beta=0"
        )
    assert advantages_BT.ndim == 2, "one row a completion: [B, T] or [B, 1]"
    keep_BT = mask_BT.bool()
    policy_BT = log_probs_BT.masked_fill(~keep_BT, 0.0)
    old_BT = policy_BT if old_log_probs_BT is None else old_log_probs_BT.masked_fill(~keep_BT, 0.0)
    log_ratio_BT = policy_BT - old_BT.detach()
    advantages_BT = advantages_BT.expand_as(policy_BT)
    if algorithm.negative_weight != 1:
        weak_BT = algorithm.negative_weight * advantages_BT
        advantages_BT = torch.where(advantages_BT < 0, weak_BT, advantages_BT)

    weight_log_ratio_BT = log_ratio_BT
    if algorithm.ratio == "sequence":
        tokens_B1 = keep_BT.sum(dim=1, keepdim=True).clamp(min=1)
        mean_B1 = log_ratio_BT.sum(dim=1, keepdim=True) / tokens_B1
        weight_log_ratio_BT = mean_B1.expand_as(policy_BT)
    ratio_BT = weight_log_ratio_BT.clamp(max=MAX_LOG_RATIO).exp()

    if algorithm.objective == "cispo":
        capped_BT = ratio_BT.clamp(max=algorithm.epsilon_high).detach()
        per_token_BT = -capped_BT * advantages_BT * policy_BT
        low_BT = torch.zeros_like(keep_BT)
        high_BT = ratio_BT > algorithm.epsilon_high
    else:
        assert algorithm.epsilon_low is not None
        lowest, highest = 1 - algorithm.epsilon_low, 1 + algorithm.epsilon_high
        clipped_BT = ratio_BT.clamp(lowest, highest)
        per_token_BT = -torch.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)
        low_BT = (ratio_BT < lowest) & (advantages_BT < 0)
        high_BT = (ratio_BT > highest) & (advantages_BT > 0)

    reference_k3_BT = None
    if reference_log_probs_BT is not None:
        reference_BT = reference_log_probs_BT.masked_fill(~keep_BT, 0.0).detach()
        reference_k3_BT = _k3(reference_BT - policy_BT)
        if algorithm.needs_reference:
            weight_BT = ratio_BT if algorithm.importance_weighted_k3 else 1.0
            per_token_BT = per_token_BT + algorithm.beta * weight_BT * reference_k3_BT
        reference_k3_BT = reference_k3_BT.detach()

    log_ratio_BT = log_ratio_BT.detach()
    return LossTerms(
        per_token_BT=per_token_BT.masked_fill(~keep_BT, 0.0),
        ratio_BT=ratio_BT.detach().masked_fill(~keep_BT, 0.0),
        clipped_low_BT=low_BT & keep_BT,
        clipped_high_BT=high_BT & keep_BT,
        k1_BT=-log_ratio_BT,
        k3_BT=_k3(log_ratio_BT),
        reference_k3_BT=reference_k3_BT,
    )


def _k3(log_ratio_BT: Tensor) -> Tensor:
    """exp(d) - d - 1: an estimate of a KL divergence that is never negative; 0 where d is 0."""
    d_BT = log_ratio_BT.clamp(max=MAX_LOG_RATIO)
    return d_BT.exp() - d_BT - 1


def token_sums(terms: LossTerms, mask_BT: Tensor) -> dict[str, Tensor]:
    """Sums over the tokens of one micro-batch, of what `token_means` turns into means."""
    sums = {
        "tokens": mask_BT.bool().sum(),
        "ratio": terms.ratio_BT.sum(),
        "clip_low_rate": terms.clipped_low_BT.sum(),
        "clip_high_rate": terms.clipped_high_BT.sum(),
        "kl_old_k1": terms.k1_BT.sum(),
        "kl_old_k3": terms.k3_BT.sum(),
    }
    if terms.reference_k3_BT is not None:
        sums["kl_reference_k3"] = terms.reference_k3_BT.sum()
    return sums


def token_means(micro_batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
    """Means per token over all micro-batches, without "tokens"; {} if no token had a loss."""
    totals: dict[str, float] = {}
    for sums in micro_batches:
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + float(value)
    tokens = totals.pop("tokens", 0.0)
    return {name: total / tokens for name, total in totals.items()} if tokens else {}


@torch.no_grad()
def move_reference_(reference: Iterable[Tensor], policy: Iterable[Tensor], mix_up: float) -> None:
    """Move each trained parameter to mix_up * policy + (1 - mix_up) * reference, in place."""
    for reference_parameter, policy_parameter in zip(reference, policy, strict=True):
        assert reference_parameter.shape == policy_parameter.shape, "not the same model"
        moved = torch.lerp(reference_parameter.float(), policy_parameter.float(), mix_up)
        reference_parameter.copy_(moved)
