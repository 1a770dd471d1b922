"""Supervised training: its loss, its validation, and its cut into micro-batches."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlt.data.batches import StepDataModule
from rlt.data.problem import make_problem
from rlt.data.renderer import Renderer
from rlt.llm.logprobs import row_log_probs
from rlt.llm.models import LanguageModel
from rlt.training import SFT, Example
from tests.training.fitting import (
    CONSTANT,
    SGD,
    apart_from_the_cut,
    fit_sft,
    trainer,
    weights,
)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_sft_1x8_equals_8x1(
    gradient_checkpointing: bool,
    renderer: Renderer,
    tiny: Callable[..., LanguageModel],
    tmp_path: Path,
) -> None:
    whole, single = tiny(0), tiny(0)
    before = weights(whole.model)
    one = fit_sft(renderer, whole, tmp_path)
    other = fit_sft(renderer, single, tmp_path, 1, gradient_checkpointing=gradient_checkpointing)
    assert (weights(whole.model) - before).abs().max() > 1e-3
    torch.testing.assert_close(weights(single.model), weights(whole.model), rtol=0, atol=1e-6)
    assert apart_from_the_cut(other) == pytest.approx(apart_from_the_cut(one), abs=1e-5)
    assert one["train/target_tokens"] == 1 + 2 + 7 + 1 + 5 + 7 + 2 + 9


def test_sft_loss_is_the_mean_over_target_tokens(
    renderer: Renderer, tiny: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    made = tiny(0)
    model = copy.deepcopy(made.model)
    metrics = fit_sft(renderer, made, tmp_path, steps=1)
    texts = ["a", "bc", "def ghi", "j", "klmno", "p q r s", "tu", "vwxyz 123"]
    total, tokens = 0.0, 0
    for i, text in enumerate(texts):
        prompt = renderer.teacher_prompt(make_problem("?" * (i % 3 + 1), "2"))
        target = renderer.encode(text)
        with torch.no_grad():
            log_probs = model(torch.tensor([[*prompt, *target]])).logits[0].log_softmax(-1)
        total -= sum(float(log_probs[len(prompt) - 1 + k, t]) for k, t in enumerate(target))
        tokens += len(target)
    assert metrics["train/loss"] == pytest.approx(total / tokens, abs=1e-5)


def test_sft_validation_is_a_mean_over_all_target_tokens(
    renderer: Renderer, tiny: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    made, asked = tiny(0), []

    def answer_accuracy(policy: Any) -> float:
        asked.append((policy is made.model, policy.training))
        return 0.25

    module = SFT(made.model, renderer, SGD, CONSTANT, 1, 1.0, 50, answer_accuracy=answer_accuracy)
    examples = [
        Example(renderer.encode("q"), renderer.encode(t), t) for t in ("abc", "d", "efghij")
    ]
    # Batches of two and one: a mean of the batches' means would weigh "efghij" differently.
    datamodule = StepDataModule(examples, examples, 2, 1, None, 0)
    made_trainer = trainer(tmp_path, limit_val_batches=1.0)
    [found] = made_trainer.validate(module, datamodule=datamodule, verbose=False)
    rows = [(example.prompt, example.target) for example in examples]
    values = row_log_probs(made.model, rows, temperature=1.0, pad_id=0, token_budget=1)
    assert found["validation/loss"] == pytest.approx(-float(torch.cat(values).mean()), abs=1e-5)
    assert found["validation/answer_accuracy"] == 0.25 and asked == [(True, False)]


def test_sft_trains_in_train_mode(
    renderer: Renderer, tiny: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    made, modes = tiny(0), set()
    made.model.model.register_forward_hook(
        lambda model, *_: modes.add((model.training, torch.is_grad_enabled()))
    )
    fit_sft(renderer, made, tmp_path)
    assert modes == {(True, True)} and not made.model.training
