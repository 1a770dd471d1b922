"""How many optimizer steps a rollout gives, at which rate, and on which weights."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from rlt.data.renderer import Renderer
from rlt.llm.models import LanguageModel
from rlt.rewards import RewardScorer
from rlt.training import RL, Teaching
from rlt.training.rollout_batch import RolloutBatch
from tests.training.fitting import (
    CONSTANT,
    PAPER,
    SGD,
    TEXTS,
    ScriptedRollout,
    fit_rl,
    paper_reward,
    teacher_rl,
    weights,
)


@pytest.mark.parametrize(
    ("num_iterations", "minibatches"), [(1, 1), (3, 1), (2, 4), (1, 8), (2, 3)]
)
def test_optimizer_steps_per_rollout(
    num_iterations: int,
    minibatches: int,
    renderer: Renderer,
    tiny: Callable[..., LanguageModel],
    tmp_path: Path,
) -> None:
    made = tiny(0)
    steps: list[int] = []

    class Counted(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            steps.append(1)
            return super().step(closure)

    module = teacher_rl(
        renderer, made, optim=functools.partial(Counted, lr=0.01), num_iterations=num_iterations,
        minibatches=minibatches,
    )  # fmt: skip
    picked: list[list[int]] = []
    original = module.minibatch_step

    def spy(rollout: RolloutBatch, indices: list[int]) -> dict[str, float]:
        picked.append(indices)
        return original(rollout, indices)

    module.minibatch_step = spy  # type: ignore[method-assign]
    made_trainer = fit_rl(module, 2, tmp_path)
    assert len(steps) == made_trainer.global_step == 2 * num_iterations * minibatches
    for start in range(0, len(picked), minibatches):  # each pass sees every completion once
        together = [n for indices in picked[start : start + minibatches] for n in indices]
        assert sorted(together) == list(range(8))


def test_autocast_sees_the_weights_as_they_are_after_each_optimizer_step(
    renderer: Renderer, tiny: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    norms: dict[int, float] = {}
    for num_iterations in (1, 2):
        optim = functools.partial(torch.optim.SGD, lr=2.0)
        teacher = tiny(0)
        for name, parameter in teacher.model.named_parameters():
            parameter.requires_grad_("proj" in name)  # what autocast casts
        module = teacher_rl(renderer, teacher, num_iterations=num_iterations, optim=optim, beta=0.0)
        made = fit_rl(module, 1, tmp_path, precision="bf16-mixed")
        norms[num_iterations] = float(made.callback_metrics["policy/grad_norm"])
    # The second pass starts from other weights than the first: its gradient is another one.
    assert norms[1] > 0 and abs(norms[2] / norms[1] - 1) > 0.01


def test_more_minibatches_than_completions_are_refused(
    renderer: Renderer, tiny: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"algorithm\.minibatches=9 exceeds the 8 completions"):
        fit_rl(teacher_rl(renderer, tiny(0), minibatches=9), 1, tmp_path)


def test_settings_that_cannot_work_are_refused(
    renderer: Renderer, tiny: Callable[..., LanguageModel]
) -> None:
    with pytest.raises(ValueError, match=r"module\.group_size=1"):
        teacher_rl(renderer, tiny(0), completions=1)
    scorer = RewardScorer(paper_reward(), tiny(1).model, renderer, temperature=0.7, token_budget=99)
    with pytest.raises(ValueError, match=r"algorithm\.beta=0\.04 needs a reference"):
        RL(
            tiny(0).model, renderer, None, Teaching(renderer, scorer), ScriptedRollout(renderer,
            TEXTS), PAPER, SGD, CONSTANT, 1, 4, None, 99, 0, 1,
        )  # fmt: skip


def test_the_schedule_and_the_clipped_norm(
    renderer: Renderer, tiny: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    made = tiny(0)
    before = weights(made.model)
    module = teacher_rl(renderer, made, optim=functools.partial(torch.optim.SGD, lr=0.5))
    module.max_grad_norm = 1e-3
    module.schedule = functools.partial(get_scheduler, name="linear", num_warmup_steps=0)
    module.optimizer_steps = 4
    metrics = fit_rl(module, 2, tmp_path).callback_metrics
    assert float(metrics["policy/lr"]) == pytest.approx(0.5 * 3 / 4)  # of the second step
    assert float(metrics["policy/grad_norm"]) > 1e-3
    # Two steps of norm 1e-3 at most, at rates 0.5 and 0.375.
    assert 0 < (weights(made.model) - before).norm() <= 1e-3 * 0.875 * 1.01
