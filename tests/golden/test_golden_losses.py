"""Losses and gradients equal those of an independent implementation (trl 1.16.0), to 1e-5."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlt.training.algorithms import (
    Aggregation,
    Algorithm,
    group_advantages,
    policy_loss_terms,
    token_weights,
)

GOLDEN = json.loads((Path(__file__).parent / "losses.json").read_text())
AGGREGATION: dict[str, Aggregation] = {
    "grpo": "sequence_mean",
    "bnpo": "token_mean",
    "dapo": "token_mean",
    "cispo": "token_mean",
    "dr_grpo": "max_length",
}


def algorithm_of(case: dict[str, Any]) -> Algorithm:
    cispo = case["loss_type"] == "cispo"
    return Algorithm(
        aggregation=AGGREGATION[case["loss_type"]],
        objective="cispo" if cispo else "clip",
        ratio=case["importance_sampling_level"],
        epsilon_low=None if cispo else case["epsilon_low"],
        epsilon_high=case["epsilon_high"],
        beta=case["beta"],
        importance_weighted_k3=True,
        scale_rewards=case["scale_rewards"],
        negative_weight=1.0,
        mask_overlong=False,
        correction="none",
        correction_cap=2.0,
        num_iterations=1,
        minibatches=1,
        reference_update_every_steps=None,
        reference_mix_up=0.9,
    )


def test_all_seven_losses_are_here_on_and_off_policy() -> None:
    names = {(case["name"], case["on_policy"]) for case in GOLDEN["cases"]}
    assert len(names) == 14


@pytest.mark.parametrize("chunk", [8, 1, 3], ids=["1x8", "8x1", "ragged"])
@pytest.mark.parametrize(
    "case", GOLDEN["cases"], ids=lambda c: f"{c['name']}-{'on' if c['on_policy'] else 'off'}"
)
def test_loss_and_gradient(case: dict[str, Any], chunk: int) -> None:
    algorithm = algorithm_of(case)
    mask_BT = torch.tensor(GOLDEN["mask"])
    policy_BT = torch.tensor(GOLDEN["policy_log_probs"], requires_grad=True)
    old_BT = torch.tensor(GOLDEN["old_log_probs"])
    reference_BT = torch.tensor(GOLDEN["reference_log_probs"])
    advantages_PG = group_advantages(torch.tensor(GOLDEN["rewards"]), case["scale_rewards"])
    advantages_B = advantages_PG.flatten()
    torch.testing.assert_close(advantages_B, torch.tensor(case["advantages"]), rtol=0, atol=1e-5)

    weights_BT = token_weights(mask_BT, algorithm.aggregation, GOLDEN["max_completion_tokens"])
    loss = 0.0
    for start in range(0, 8, chunk):
        rows = slice(start, start + chunk)
        terms = policy_loss_terms(
            policy_BT[rows],
            None if case["on_policy"] else old_BT[rows],
            advantages_B[rows, None],
            mask_BT[rows],
            algorithm,
            reference_BT[rows] if algorithm.needs_reference else None,
        )
        micro = (terms.per_token_BT * weights_BT[rows]).sum()
        micro.backward()
        loss += micro.item()

    assert loss == pytest.approx(case["loss"], rel=0, abs=1e-5)
    expected_BT = torch.tensor(case["grad_log_probs"])
    assert policy_BT.grad is not None
    torch.testing.assert_close(policy_BT.grad, expected_BT, rtol=0, atol=1e-5)
