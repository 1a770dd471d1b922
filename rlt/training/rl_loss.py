"""The loss of one micro-batch of a rollout, weighted as a part of its optimizer step.

Shapes: B completion of a micro-batch, T token, D hidden dimension, N real token of the micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from rlt.llm.batching import pad_rows
from rlt.llm.logprobs import batch_log_probs, continuation_hidden
from rlt.training import algorithms
from rlt.training.algorithms import Algorithm
from rlt.training.correction import importance_weights
from rlt.training.credit import exact_kl_loss
from rlt.training.rollout_batch import RolloutBatch


@dataclass(frozen=True)
class TokenWeights:
    """What each token of an optimizer step counts for.

    Attributes:
        mask_BT: True where a token has a policy loss.
        policy_BT: what that loss counts for; includes the weights of `algorithm.correction`.
        exact_kl_BT: what an exact KL at the token counts for. It does not depend on which token
            was drawn there, so nothing corrects it.
    """

    mask_BT: Tensor
    policy_BT: Tensor
    exact_kl_BT: Tensor

    def of(self, rows: Sequence[int]) -> "TokenWeights":
        """Those of some completions."""
        index = list(rows)
        return TokenWeights(self.mask_BT[index], self.policy_BT[index], self.exact_kl_BT[index])


def token_weights(
    rollout: RolloutBatch, picked: Sequence[int], algorithm: Algorithm, max_new_tokens: int
) -> TokenWeights:
    """Which tokens of an optimizer step have a loss, and what the loss of each counts for.

    Where the sampler's probabilities were not the policy's, `algorithm.correction` weighs tokens.

    Args:
        rollout: the completions.
        picked: places of those that the optimizer step is over.
        algorithm: says which completions are left out and how tokens are averaged.
        max_new_tokens: the limit that completions were sampled with.

    Returns:
        Weights of shape `[len(picked), T]`.
    """
    mask_BT = algorithms.loss_mask(rollout.token_mask(picked), rollout.overlong(picked), algorithm)
    plain_BT = algorithms.token_weights(mask_BT, algorithm.aggregation, max_new_tokens)
    policy_BT = plain_BT
    if rollout.sampler_ratios is not None:
        importance_BT = torch.ones(mask_BT.shape)
        ratio_BT = pad_sequence(
            [rollout.sampler_ratios[n] for n in picked], batch_first=True, padding_value=1.0
        )
        importance_BT[:, : ratio_BT.shape[1]] = importance_weights(
            ratio_BT, algorithm.correction, algorithm.correction_cap
        )
        mask_BT = mask_BT & (importance_BT > 0)  # a token that is left out counts in no mean
        policy_BT = algorithms.token_weights(mask_BT, algorithm.aggregation, max_new_tokens)
        policy_BT = policy_BT * importance_BT
    return TokenWeights(mask_BT, policy_BT, plain_BT)


def micro_batch_loss(
    policy: PreTrainedModel,
    student: PreTrainedModel | None,
    rollout: RolloutBatch,
    own: Sequence[int],
    weights: TokenWeights,
    algorithm: Algorithm,
    temperature: float,
    pad_id: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy's loss over the completions at `own`, with gradient.

    Args:
        policy: the model that is trained, on its device.
        student: the reward's student; read where the rollout has weights of an exact KL.
        rollout: completions with advantages.
        own: places of the B completions.
        weights: of these completions; T may be longer than they are.
        algorithm: loss settings.
        temperature: at which log-probs are taken.
        pad_id: the id of padding.

    Returns:
        The loss (a scalar), and sums over its tokens for `rlt.training.algorithms.token_means`.
    """
    batch = pad_rows([rollout.rows[n] for n in own], pad_id, policy.device)
    hidden_ND = continuation_hidden(policy, batch)
    log_probs_BT, entropy_BT = batch_log_probs(policy, batch, temperature, hidden_ND)
    T, device = log_probs_BT.shape[1], log_probs_BT.device
    mask_BT, policy_weights_BT = (
        of_all[:, :T].to(device) for of_all in (weights.mask_BT, weights.policy_BT)
    )

    def stacked(values: Sequence[Tensor] | None) -> Tensor | None:
        if values is None:
            return None
        return pad_sequence([values[n] for n in own], batch_first=True)

    terms = algorithms.policy_loss_terms(
        log_probs_BT,
        stacked(rollout.log_probs if algorithm.needs_old_log_probs else None),
        rollout.advantages_NT[own, :T].to(device),
        mask_BT,
        algorithm,
        stacked(rollout.reference_log_probs),
    )
    loss = (terms.per_token_BT * policy_weights_BT).sum()
    if rollout.exact_kl_weights_N is not None:
        table = rollout.reward_table
        assert student is not None, "an exact KL needs the reward's student"
        loss = loss + exact_kl_loss(
            policy,
            hidden_ND.split(batch.mask_BC.sum(1).tolist()),
            student,
            [table.scores[n].student_hidden_TD for n in own],
            table.kl_weight * rollout.exact_kl_weights_N[own],
            weights.exact_kl_BT[:, :T].to(device),
            temperature,
        )
    sums = algorithms.token_sums(terms, mask_BT) | {"entropy": (entropy_BT * mask_BT).sum()}
    return loss, sums
