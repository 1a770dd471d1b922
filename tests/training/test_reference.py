"""The frozen models of RL: a reference that moves by hand, and what a checkpoint holds of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from rlt.data.renderer import Renderer
from rlt.llm.models import LanguageModel, freeze
from tests.training.fitting import fit_rl, teacher_rl, weights


def test_frozen_models_are_no_part_of_the_state(
    renderer: Renderer, tiny: Callable[..., LanguageModel]
) -> None:
    module = teacher_rl(renderer, tiny(0), student=freeze(tiny(5).model))
    names = set(module.state_dict())
    assert names == {f"policy.{name}" for name in module.policy.state_dict()}
    assert len(list(module.parameters())) == len(list(module.policy.parameters()))


def test_the_reference_moves_by_hand(
    renderer: Renderer, tiny: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    made = tiny(0)
    module = teacher_rl(
        renderer, made, reference_update_every_steps=2, reference_mix_up=0.75, beta=0.1
    )
    assert module.reference is not None and module.task.scorer.student is module.reference
    start = weights(module.reference)
    history: list[tuple[Tensor, Tensor]] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            history.append((weights(module.policy), weights(module.reference)))

    fit_rl(module, 5, tmp_path, callbacks=[Watch()])
    assert torch.equal(history[0][1], start)  # after step 1: not yet
    second = 0.75 * history[1][0] + 0.25 * start
    torch.testing.assert_close(history[1][1], second, rtol=0, atol=1e-6)
    assert torch.equal(history[2][1], history[1][1])
    fourth = 0.75 * history[3][0] + 0.25 * history[1][1]
    torch.testing.assert_close(history[3][1], fourth, rtol=0, atol=1e-6)
    assert torch.equal(history[4][1], history[3][1])
    assert (fourth - second).abs().max() > 1e-4


def test_a_reference_that_moves_is_in_the_checkpoint(
    renderer: Renderer, tiny: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    fixed = teacher_rl(renderer, tiny(0))
    fit_rl(fixed, 1, tmp_path).save_checkpoint(tmp_path / "fixed.ckpt")
    assert "reference" not in torch.load(tmp_path / "fixed.ckpt", weights_only=True)

    moving = teacher_rl(renderer, tiny(0), reference_update_every_steps=1)
    fit_rl(moving, 1, tmp_path).save_checkpoint(tmp_path / "moving.ckpt")
    checkpoint = torch.load(tmp_path / "moving.ckpt", weights_only=True)
    restored = teacher_rl(renderer, tiny(0), reference_update_every_steps=1)
    assert not torch.equal(weights(restored.reference), weights(moving.reference))
    restored.on_load_checkpoint(checkpoint)
    assert torch.equal(weights(restored.reference), weights(moving.reference))
