"""The language-model head: from hidden states to logits, log-probs, entropies and KL divergences.

The head runs in chunks of tokens and its logits are float32. The logits of a whole batch never
exist as one tensor.

Capital letters in names are dimensions: D hidden size, V vocabulary, N tokens (n in one chunk).
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

# Largest number of logits in memory at once: 2^25 float32 values are 128 MiB.
MAX_LOGITS = 2**25


def logits_of(model: PreTrainedModel, hidden_ND: Tensor, temperature: float) -> Tensor:
    """Return the float32 logits `[N, V]` of hidden states `[N, D]`, divided by the temperature.

    At temperature 1 they are the logits that the model's own forward pass returns.
    """
    config = model.config
    softcap = getattr(config, "final_logit_softcapping", None)
    head = model.get_output_embeddings()
    if not softcap and getattr(head, "bias", None) is None and hidden_ND.dtype == torch.float32:
        # Dividing the hidden states by the temperature is cheaper than dividing the logits, in the
        # backward pass too, and gives the same result because the head is linear.
        hidden_ND, temperature = hidden_ND / temperature, 1.0
    logits_NV = head(hidden_ND).float()
    if getattr(config, "logits_scaling", None):  # Granite
        logits_NV = logits_NV / config.logits_scaling
    if getattr(config, "logit_scale", None):  # Cohere
        logits_NV = logits_NV * config.logit_scale
    if softcap:
        logits_NV = torch.tanh(logits_NV / softcap) * softcap
    return logits_NV if temperature == 1.0 else logits_NV / temperature


def check_head(model: PreTrainedModel) -> None:
    """Check that the model's own logits are `logits_of` its hidden states.

    Raises:
        ValueError: they differ, because the model scales its logits for example.
    """
    ids = torch.tensor([[1, 2, 3]], device=model.device)
    with torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits[0].float()
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        ours = logits_of(model, hidden, 1.0)
    if (own - ours).abs().max() > 0.02 * own.abs().max():
        raise ValueError(
            f"{type(model).__name__}: logits are not a plain head over the hidden states "
            f"(largest difference {(own - ours).abs().max():.3g}); this architecture is not "
            "supported, choose another model"
        )


def _chunks(model: PreTrainedModel, N: int) -> list[slice]:
    size = max(1, MAX_LOGITS // model.get_output_embeddings().weight.shape[0])
    return [slice(start, start + size) for start in range(0, N, size)]


class _ChosenLogProbs(torch.autograd.Function):
    """`log_softmax` and `gather` in one, so that the backward pass makes one `[N, V]` tensor."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        log_probs_NV = logits_NV.log_softmax(-1)
        entropy_N = -log_probs_NV.exp().mul_(log_probs_NV).sum(-1)
        ctx.save_for_backward(log_probs_NV, targets_N)
        ctx.mark_non_differentiable(entropy_N)
        return log_probs_NV.gather(-1, targets_N[:, None])[:, 0], entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        log_probs_NV, targets_N = ctx.saved_tensors
        grad_N1 = grads[0][:, None]
        grad_NV = log_probs_NV.exp().mul_(-grad_N1)
        return grad_NV.scatter_add_(-1, targets_N[:, None], grad_N1), None


def log_probs_and_entropies(
    model: PreTrainedModel, hidden_ND: Tensor, targets_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the log-prob of each target and the entropy of the distribution it comes from.

    Args:
        model: the model whose head is used.
        hidden_ND: hidden states that predict the targets.
        targets_N: token ids.
        temperature: the logits are divided by it.

    Returns:
        Log-probs `[N]` with gradient, and entropies `[N]` without, both in nats.
    """

    def chunk_values(hidden_nD: Tensor, targets_n: Tensor) -> Any:
        return _ChosenLogProbs.apply(logits_of(model, hidden_nD, temperature), targets_n)

    chunks = _chunks(model, len(targets_N))
    if not chunks:
        empty = hidden_ND.new_zeros(0, dtype=torch.float32)
        return empty, empty
    if len(chunks) == 1:
        return chunk_values(hidden_ND, targets_N)
    # The logits of a chunk are not kept. The backward pass computes them again.
    parts = [
        checkpoint(chunk_values, hidden_ND[c], targets_N[c], use_reentrant=False) for c in chunks
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


@torch.no_grad()
def chunked_log_probs(
    model: PreTrainedModel, hidden_ND: Tensor, targets_N: Tensor, temperature: float
) -> Tensor:
    """Return the log-probs `[N]` of the targets in nats, without gradient.

    The arguments are those of `log_probs_and_entropies`.
    """
    parts = [hidden_ND.new_zeros(0, dtype=torch.float32)]
    for chunk in _chunks(model, len(targets_N)):
        log_probs_nV = logits_of(model, hidden_ND[chunk], temperature).log_softmax(-1)
        parts.append(log_probs_nV.gather(-1, targets_N[chunk][:, None])[:, 0])
    return torch.cat(parts)


class _ExactKL(torch.autograd.Function):
    """KL(p‖q) `[N]` of two sets of logits, with a gradient for the logits of p alone.

    One `[N, V]` tensor is kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, p_logits_NV: Tensor, q_logits_NV: Tensor) -> Tensor:
        log_ratio_NV = p_logits_NV.log_softmax(-1)
        probs_NV = log_ratio_NV.exp()
        log_ratio_NV -= q_logits_NV.log_softmax(-1)
        kl_N = (probs_NV * log_ratio_NV).sum(-1)
        ctx.save_for_backward(probs_NV.mul_(log_ratio_NV.sub_(kl_N[:, None])))
        return kl_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (slope_NV,) = ctx.saved_tensors
        return slope_NV * grads[0][:, None], None


def exact_kl(
    p_model: PreTrainedModel, p_hidden_ND: Tensor, q_model: PreTrainedModel, q_hidden_ND: Tensor,
    temperature: float,
) -> Tensor:  # fmt: skip
    """Return KL(p‖q) over the vocabulary at each of N places, with gradient for p's model.

    Args:
        p_model: the model of p.
        p_hidden_ND: hidden states of p's model.
        q_model: the model of q, which has the same vocabulary and gets no gradient.
        q_hidden_ND: hidden states of q's model at the same places.
        temperature: the logits of both models are divided by it.

    Returns:
        The divergences `[N]` in nats.
    """

    def chunk_kl(p_hidden_nD: Tensor, q_hidden_nD: Tensor) -> Any:
        with torch.no_grad():
            q_logits_nV = logits_of(q_model, q_hidden_nD, temperature)
        return _ExactKL.apply(logits_of(p_model, p_hidden_nD, temperature), q_logits_nV)

    parts = [p_hidden_ND.new_zeros(0, dtype=torch.float32)]
    for chunk in _chunks(p_model, len(p_hidden_ND)):
        parts.append(
            checkpoint(chunk_kl, p_hidden_ND[chunk], q_hidden_ND[chunk], use_reentrant=False)
        )
    return torch.cat(parts)


def chunked_exact_kl(
    p_model: PreTrainedModel, p_hidden_ND: Tensor, q_model: PreTrainedModel, q_hidden_ND: Tensor,
    temperature: float,
) -> Tensor:  # fmt: skip
    """Return KL(p‖q) `[N]` in nats as `exact_kl` does, without gradient."""
    parts = [p_hidden_ND.new_zeros(0, dtype=torch.float32)]
    with torch.no_grad():
        for chunk in _chunks(p_model, len(p_hidden_ND)):
            p_NV = logits_of(p_model, p_hidden_ND[chunk], temperature).log_softmax(-1)
            q_NV = logits_of(q_model, q_hidden_ND[chunk], temperature).log_softmax(-1)
            parts.append((p_NV.exp() * (p_NV - q_NV)).sum(-1))
    return torch.cat(parts)
