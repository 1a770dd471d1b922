"""A NaN or an infinity stops training before the step, and names the step and its problems."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlt.data.batches import StepDataModule
from rlt.data.renderer import Renderer
from rlt.llm.finite_checks import NotFiniteError
from rlt.llm.models import LanguageModel, freeze
from rlt.rewards import Reward, TokenScores
from rlt.sampling import HFRollout
from tests.training.fitting import PROBLEMS, fit_rl, fit_sft, paper_reward, teacher_rl, weights


class BrokenReward:
    """NaN for one completion."""

    temperature = None
    correctness = None
    needs: frozenset[str] = frozenset()

    def __init__(self, reward: Reward) -> None:
        self.reward = reward

    def __call__(self, scores: Sequence[TokenScores]) -> Any:
        table = self.reward(scores)
        table.rewards[1] = float("nan")
        return table


def test_a_nan_reward_takes_no_step(
    renderer: Renderer, tiny: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    made = tiny(0)
    before = weights(made.model)
    module = teacher_rl(renderer, made, reward=BrokenReward(paper_reward()))
    [first, _] = StepDataModule(PROBLEMS, [], 2, 1, None, 0).train_dataloader().batch(0)
    where = r"training step 0, after 0 optimizer steps: reward is nan"
    with pytest.raises(NotFiniteError, match=rf"{where} \(problems: {first.id}\)"):
        fit_rl(module, 1, tmp_path)
    assert torch.equal(weights(made.model), before)


@pytest.mark.parametrize("bad", ["policy", "reference"])
def test_broken_weights_are_told_with_step_and_problems(
    bad: str, renderer: Renderer, tiny: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    made, student = tiny(0), freeze(tiny(5).model)
    rollout = HFRollout(1.0, max_new_tokens=4) if bad == "policy" else None
    module = teacher_rl(renderer, made, student=student, rollout=rollout)
    assert module.reference is not None
    broken = {"policy": made.model, "reference": module.reference}[bad]
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")  # type: ignore[union-attr, index]
    what = {
        "policy": "the model's logits are NaN or infinite",
        "reference": "a log-prob of the reference is nan",
    }[bad]
    with pytest.raises(NotFiniteError, match=f"training step 0, after 0 .*: {what}") as error:
        fit_rl(module, 1, tmp_path)
    assert all(problem.id in str(error.value) for problem in PROBLEMS)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_nan_loss_or_gradient_takes_no_step(
    bad: str, renderer: Renderer, tiny: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    made = tiny(0)
    if bad == "loss":
        with torch.no_grad():
            made.model.model.norm.weight[0] = float("nan")
    else:
        made.model.model.norm.weight.register_hook(lambda grad: grad * float("inf"))
    before = weights(made.model)
    what = "the loss is nan" if bad == "loss" else "the gradient norm is (nan|inf)"
    with pytest.raises(NotFiniteError, match=f"training step 0, after 0 optimizer steps: {what}"):
        fit_sft(renderer, made, tmp_path, steps=1)
    torch.testing.assert_close(weights(made.model), before, rtol=0, atol=0, equal_nan=True)
