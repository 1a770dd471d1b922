"""Credit: which share of a completion's reward each of its tokens gets, as pure functions.

The paper's r_KL is a mean over the explanation's tokens, so its reward is a sum of one addend per
token and a rest R that belongs to the completion as a whole (r_SS, the extremes, the end tag):

    r = R + Σ_t x_t        x_t = −λ · kl_t / T   for `reward=rlt`

`credit=completion` is the published credit: every token gets the advantage of the whole reward.
`credit=token` lets each token pay for itself and for what follows it, in the reward's own units:

    A_t = (R − mean R + w · x_t + Σ_{s > t} γ^(s − t) · x_s − baseline) / spread of r

With γ = 1 and w = 1 this is the reward-to-go of the published reward; with γ = 0 a token pays for
itself alone, w times. docs/dense_credit.md derives it and tells where it helps and where not.

Used by `rlt stage=teacher_rl credit=token`; the settings are in conf/credit/.
Shapes: P problem, G completion in its group, N = P × G, T token of a completion.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlt.llm.lm_head import exact_kl
from rlt.training.algorithms import group_advantages

LEAST_SPREAD = 0.5  # in units of the reward, which are nats for the rewards of log-probs

Baseline = Literal["token", "position", "none"]


class Credit(Protocol):
    """From rewards to the advantage of every token."""

    needs_token_rewards: bool
    exact: bool

    def kl_weights(self, rewards_PG: Tensor, scale: bool) -> Tensor | None:
        """What each completion's mean exact KL weighs in the loss, `[N]`.

        The weights are in units of the reward's own r_KL; None where the loss has no exact KL.
        """
        ...

    def advantages(
        self,
        rewards_PG: Tensor,
        token_rewards: Sequence[Tensor],
        lengths: Sequence[int],
        scale: bool,
    ) -> Tensor:
        """Advantages `[N, T]` of the tokens of N completions; T is the longest of them.

        Args:
            rewards_PG: the completions' rewards, group by group.
            token_rewards: of each completion, the addends of its reward that belong to single
                tokens, from the first token on; tokens beyond have none.
            lengths: tokens of each completion.
            scale: divide by the standard deviation of the rewards, in the group or the batch.
        """
        ...


@dataclass(frozen=True)
class CompletionCredit:
    """The published credit: a completion's tokens share its advantage."""

    needs_token_rewards = False
    exact = False

    def kl_weights(self, rewards_PG: Tensor, scale: bool) -> Tensor | None:
        """None: the loss has no exact KL."""
        return None

    def advantages(
        self,
        rewards_PG: Tensor,
        token_rewards: Sequence[Tensor],
        lengths: Sequence[int],
        scale: bool,
    ) -> Tensor:
        """`[N, T]`, the group-relative advantage of each completion at all of its tokens."""
        advantages_N1 = group_advantages(rewards_PG, scale).view(-1, 1)
        return advantages_N1.expand(-1, max(1, *lengths))


@dataclass(frozen=True)
class TokenCredit:
    """Each token pays its own share of the reward and, discounted, the shares of later ones.

    Args:
        discount: γ in [0, 1], what a token pays of the shares of later tokens. 1 is the
            reward-to-go, 0 the token's own share alone.
        weight: w, how often a token pays its own share; 1 keeps the reward's units.
        clip: λ · kl_t, a share times the explanation's tokens, is held within ± this; null leaves
            it. With `exact` that holds for later shares alone.
        baseline: what is subtracted. `token`: what the group's mean token would pay. `position`:
            the mean of what is paid at the same position, over the group's explanations that
            reach it. `none`: nothing.
        exact: a token's own share is not the sampled log-ratio, but the KL over the vocabulary at
            its place, through which the gradient flows; later shares stay as they were sampled.
            The expected gradient is the same but for the baseline, which the exact share does
            without, and its variance is smaller. `algorithm.negative_weight` leaves it alone.

    Raises:
        ValueError: a value is out of its range.
    """

    discount: float
    weight: float
    clip: float | None
    baseline: Baseline
    exact: bool
    needs_token_rewards = True

    def __post_init__(self) -> None:
        if not 0 <= self.discount <= 1:
            raise ValueError(f"credit.discount={self.discount}: it must be between 0 and 1")
        if self.weight < 0:
            raise ValueError(f"credit.weight={self.weight}: it must be at least 0")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"credit.clip={self.clip}: it must be above 0, or null")
        if self.baseline not in get_args(Baseline):
            raise ValueError(
                f"credit.baseline={self.baseline!r}: choose {', '.join(get_args(Baseline))}"
            )

    def advantages(
        self,
        rewards_PG: Tensor,
        token_rewards: Sequence[Tensor],
        lengths: Sequence[int],
        scale: bool,
    ) -> Tensor:
        """`[N, T]`, A_t of the module's formula."""
        P, G = rewards_PG.shape
        centred_PG = group_advantages(rewards_PG, scale=False)  # checks shape and values
        shares_NT = _padded(token_rewards, max(1, *lengths))
        spoken_NT = _padded([torch.ones(len(x)) for x in token_rewards], shares_NT.shape[1])
        sums_PG = shares_NT.sum(1).view(P, G)
        rest_PG = centred_PG - (sums_PG - sums_PG.mean(1, keepdim=True))
        if self.clip is not None:
            limit_N1 = self.clip / spoken_NT.sum(1, keepdim=True).clamp(min=1)
            shares_NT = torch.minimum(torch.maximum(shares_NT, -limit_N1), limit_N1)
        paid_NT = self._centred(shares_NT, spoken_NT, G)
        advantages_NT = rest_PG.view(-1, 1) + paid_NT
        return advantages_NT / spread(rewards_PG) if scale else advantages_NT

    def kl_weights(self, rewards_PG: Tensor, scale: bool) -> Tensor | None:
        """`[N]`, w over the spread of the rewards; None without `exact`."""
        if not self.exact:
            return None
        weights_N = torch.full_like(rewards_PG.flatten(), self.weight)
        return weights_N / spread(rewards_PG) if scale else weights_N

    def _centred(self, shares_NT: Tensor, spoken_NT: Tensor, group: int) -> Tensor:
        """What each token pays, less the baseline; zero where no token of an explanation is."""
        N, T = shares_NT.shape
        spoken_PGT = spoken_NT.view(-1, group, T)
        if self.baseline == "token":
            sums_P = shares_NT.view(-1, group * T).sum(1)
            mean_P = sums_P / spoken_PGT.sum((1, 2)).clamp(min=1)
            shares_NT = shares_NT - (mean_P[:, None, None] * spoken_PGT).view(N, T)
        paid_NT = self._paid(shares_NT)
        if self.baseline == "position":
            sums_P1T = paid_NT.view(-1, group, T).sum(1, keepdim=True)
            means_P1T = sums_P1T / spoken_PGT.sum(1, keepdim=True).clamp(min=1)
            paid_NT = paid_NT - (means_P1T * spoken_PGT).view(N, T)
        return paid_NT

    def _paid(self, shares_NT: Tensor) -> Tensor:
        """Own and later shares; with `exact` the later ones, as the loss has the own share."""
        later_NT = discounted_to_go(shares_NT, self.discount) - shares_NT
        return later_NT if self.exact else later_NT + self.weight * shares_NT


def exact_kl_loss(
    policy: PreTrainedModel,
    policy_hidden: Sequence[Tensor],
    student: PreTrainedModel,
    student_hidden: Sequence[Tensor | None],
    kl_weights_B: Tensor,
    token_weights_BT: Tensor,
    temperature: float,
) -> Tensor:
    """The loss's part of an exact credit: Σ over explanations' tokens of their weighted KL.

    Args:
        policy: the model that is trained.
        policy_hidden: policy's hidden states `[C, D]` of B completions, with gradient.
        student: the frozen student of the reward.
        student_hidden: student's hidden states `[T, D]` at their explanations' tokens, T ≤ C.
        kl_weights_B: what the mean KL of each completion weighs, in units of the loss.
        token_weights_BT: what each token's loss counts for (see
            `rlt.training.algorithms.token_weights`).
        temperature: divides both models' logits.
    """
    policy_parts, student_parts, weights = [], [], []
    for b, student_TD in enumerate(student_hidden):
        assert student_TD is not None, "the scorer kept no hidden states"
        T = len(student_TD)
        policy_parts.append(policy_hidden[b][:T])
        student_parts.append(student_TD)
        weights.append(float(kl_weights_B[b]) / max(1, T) * token_weights_BT[b, :T])
    kl_N = exact_kl(policy, torch.cat(policy_parts), student, torch.cat(student_parts), temperature)
    return (kl_N * torch.cat(weights)).sum()


def spread(rewards_PG: Tensor) -> float:
    """Root mean square of the groups' standard deviations, but at least `LEAST_SPREAD`.

    Tokens' shares differ even where rewards do not. So there is one number for the whole batch and
    a floor under it: a group, or a batch, of equal rewards would have these differences blown up.
    """
    return max(LEAST_SPREAD, float(rewards_PG.var(1).mean().sqrt()))


def within_completions(advantages_NT: Tensor, lengths: Sequence[int]) -> float:
    """Share of the advantages' squares, over all tokens, that lies between tokens of a completion.

    0 where every token has its completion's advantage, as with the published credit.
    """
    rows = [row[:n] for row, n in zip(advantages_NT, lengths, strict=True) if n]
    total = sum(float(row.square().sum()) for row in rows)
    mixed = [row for row in rows if bool((row != row[0]).any())]  # else the mean may round
    inside = sum(float((row - row.mean()).square().sum()) for row in mixed)
    return inside / total if total else 0.0


def discounted_to_go(values_NT: Tensor, discount: float) -> Tensor:
    """Σ_{s ≥ t} discount^(s − t) · values_s for every t."""
    sums_NT = values_NT.clone()
    for t in range(values_NT.shape[1] - 2, -1, -1):
        sums_NT[:, t] += discount * sums_NT[:, t + 1]
    return sums_NT


def _padded(rows: Sequence[Tensor], tokens: int) -> Tensor:
    """Rows of values as float32 `[N, tokens]`, zero where a row has none."""
    padded = torch.zeros(len(rows), tokens)
    for n, values in enumerate(rows):
        padded[n, : len(values)] = values
    return padded
