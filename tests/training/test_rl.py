"""RL: its update by definition, its cut into micro-batches, modes, logs, and that it learns."""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from rlt.data.batches import StepDataModule
from rlt.data.problem import make_problem
from rlt.data.renderer import Renderer
from rlt.llm.logprobs import row_log_probs
from rlt.llm.models import LanguageModel, freeze
from rlt.rewards import Length, Reward, ThoughtKL
from rlt.sampling import HFRollout
from tests.training.fitting import (
    PROBLEMS,
    TEXTS,
    apart_from_the_cut,
    fit_rl,
    paper_reward,
    scored,
    teacher_rl,
    trainer,
    weights,
)


@pytest.mark.parametrize(
    "algorithm",
    [
        {},
        {"aggregation": "token_mean", "mask_overlong": True},
        {"aggregation": "max_length", "scale_rewards": False, "beta": 0.0},
        {"ratio": "sequence", "num_iterations": 2},
        {"objective": "cispo", "epsilon_low": None, "epsilon_high": 5.0, "num_iterations": 2},
    ],
    ids=["grpo", "overlong", "dr_grpo", "gspo", "cispo"],
)
def test_rl_1x8_equals_8x1(
    algorithm: dict[str, Any],
    renderer: Renderer,
    tiny: Callable[..., LanguageModel],
    tmp_path: Path,
) -> None:
    student = freeze(tiny(5).model)
    found = []
    for tokens_per_micro_batch in (9999, 60, 1):
        made = tiny(0)
        before = weights(made.model)
        module = teacher_rl(renderer, made, tokens_per_micro_batch, student=student, **algorithm)
        metrics = fit_rl(module, 2, tmp_path).callback_metrics
        after = weights(made.model)
        assert (after - before).abs().max() > 1e-3
        found.append((after, apart_from_the_cut({k: float(v) for k, v in metrics.items()})))
    for after, metrics in found[1:]:
        torch.testing.assert_close(after, found[0][0], rtol=0, atol=1e-6)
        assert metrics == pytest.approx(found[0][1], rel=1e-5, abs=1e-4)


def test_the_first_update_is_the_policy_gradient(
    renderer: Renderer, tiny: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    """On the first step ratio = 1 and the reference is the policy: the gradient of the mean over
    completions of (advantage × mean log-prob), computed here from full logits."""
    made, student = tiny(0), freeze(tiny(5).model)
    model = copy.deepcopy(made.model)
    module = teacher_rl(renderer, made, student=student)
    fit_rl(module, 1, tmp_path)

    copied = LanguageModel(copy.deepcopy(model), renderer.tokenizer)
    before = teacher_rl(renderer, copied, student=student)
    # Problems come in the order of the first epoch.
    order = StepDataModule(PROBLEMS, [], 2, 1, None, 0).train_dataloader().batch(0)
    rewards = scored(before, order).rewards_PG
    assert rewards.shape == (2, 4)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    loss = torch.zeros(())
    for p, problem in enumerate(order):
        prompt = renderer.teacher_prompt(problem)
        for g, text in enumerate(TEXTS):
            target = renderer.encode(text)
            logits = model(torch.tensor([[*prompt, *target]])).logits[0] / 0.7
            log_probs = logits.log_softmax(-1)
            mean = sum(
                log_probs[len(prompt) - 1 + k, token] for k, token in enumerate(target)
            ) / len(target)
            loss = loss - advantages[p, g] * mean / 8
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad  # type: ignore[operator]
    torch.testing.assert_close(weights(made.model), weights(model), rtol=0, atol=1e-6)


def test_train_mode_in_the_step_and_eval_mode_for_every_scorer(
    renderer: Renderer, tiny: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    made, student = tiny(0), freeze(tiny(5).model)
    exact = Reward({"kl": ThoughtKL({"mean": 1.0}, estimator="exact")})  # runs the policy again
    module = teacher_rl(renderer, made, student=student, reward=exact, num_iterations=2)
    seen: dict[str, set[tuple[bool, bool]]] = {
        "policy": set(),
        "reference": set(),
        "student": set(),
    }
    models = {"policy": made.model, "reference": module.reference, "student": student}

    def note(name: str) -> Callable[..., None]:
        return lambda model, *_: seen[name].add((model.training, torch.is_grad_enabled()))

    for name, model in models.items():
        assert model is not None
        model.model.register_forward_hook(note(name))
    frozen = {name: weights(models[name]) for name in ("reference", "student")}
    fit_rl(module, 2, tmp_path)
    # (training, gradients): the policy scores in eval without, and is trained in train mode with.
    assert seen["policy"] == {(False, False), (True, True)}
    assert seen["reference"] == seen["student"] == {(False, False)}
    assert not made.model.training
    for name, before in frozen.items():
        assert torch.equal(weights(models[name]), before)
        assert not any(p.requires_grad for p in models[name].parameters())  # type: ignore[union-attr]


def test_both_halves_of_the_log_ratio_are_taken_at_the_rewards_temperature(
    renderer: Renderer, tiny: Callable[..., LanguageModel]
) -> None:
    # The student is the policy itself, told the same text: only temperatures could differ.
    made = tiny(0)
    module = teacher_rl(renderer, made, reward=paper_reward(temperature=1.0))
    rollout = scored(module, PROBLEMS)
    for n, log_probs in enumerate(rollout.log_probs):
        ids = [*rollout.parsed[n].ids]
        [expected] = row_log_probs(
            made.model, [(rollout.prompts[n], ids)], temperature=1.0, pad_id=0, token_budget=99
        )
        found = rollout.reward_table.scores[n].teacher_log_probs_T
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        if ids:  # what the policy is updated on stays at the sampling temperature
            assert (log_probs[: len(ids)] - expected).abs().max() > 1e-2


def test_what_is_logged_and_handed_on(
    renderer: Renderer, tiny: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    handed: list[tuple[int, list[dict[str, Any]]]] = []
    module = teacher_rl(renderer, tiny(0), student=freeze(tiny(5).model))
    module.samples_per_step = 3
    module.on_samples = lambda step, rows: handed.append((step, rows))
    order = StepDataModule(PROBLEMS, [], 2, 1, None, 0).train_dataloader().batch(0)
    expected = scored(module, order).reward_table
    made = fit_rl(module, 1, tmp_path, limit_val_batches=1.0)
    metrics = {name: float(value) for name, value in made.callback_metrics.items()}
    rewards = torch.tensor(expected.rewards)
    assert metrics["train/reward"] == pytest.approx(float(rewards.mean()), abs=1e-5)
    spread = float(rewards.view(2, 4).std(1).mean())
    assert metrics["train/reward_std"] == pytest.approx(spread, abs=1e-5)
    assert metrics["train/end_tag_rate"] == 0.75 and metrics["train/overlong_rate"] == 0.25
    # "one" and the tag, five characters and the tag, the tag, twelve characters.
    assert metrics["train/completion_tokens"] == (4 + 6 + 1 + 12) / 4
    kl = sum(expected.terms["kl/mean"]) / 8
    assert metrics["train/reward_terms/kl/mean"] == pytest.approx(kl, abs=1e-5)
    assert metrics["policy/ratio"] == pytest.approx(1.0)
    assert metrics["policy/lr"] == pytest.approx(0.1)
    assert metrics["policy/zero_advantage_rate"] == 0.0
    assert "validation/reward" in metrics

    [(step, rows)] = handed
    found = [row["reward"] for row in rows]
    best_first = sorted(expected.rewards, reverse=True)
    assert found == pytest.approx([*best_first[:2], best_first[-1]], abs=1e-5)
    assert step == 0 and [row["reward"] for row in json.loads(json.dumps(rows))] == found
    texts = {"one", "a b c", "", "so on and on"}
    assert all(row["explanation"] in texts and row["solution"] in "27" for row in rows)


def test_a_step_that_leaves_every_completion_out_has_no_entropy(
    renderer: Renderer, tiny: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    made = tiny(0)
    before = weights(made.model)
    module = teacher_rl(
        renderer, made, student=freeze(tiny(5).model), mask_overlong=True,
        rollout=HFRollout(1.0, max_new_tokens=2),
    )  # fmt: skip
    torch.manual_seed(0)
    metrics = fit_rl(module, 1, tmp_path).callback_metrics
    assert float(metrics["train/overlong_rate"]) == 1.0
    assert "monitor/repetition" in metrics and "monitor/entropy" not in metrics
    assert torch.equal(weights(made.model), before)


def test_a_teacher_learns_to_write_what_is_rewarded(
    nano: Callable[[int], LanguageModel],
    renderer_of: Callable[[str, Any], Renderer],
    tmp_path: Path,
) -> None:
    made = nano(0)
    renderer = renderer_of("compact", made.tokenizer)
    # Longer is better, up to a limit of tokens; the tag ends an explanation early.
    reward = Reward({"length": Length({"sum": 1.0})}, missing_end_tag_penalty=0.0)
    module = teacher_rl(
        renderer, made, reward=reward, rollout=HFRollout(1.0, max_new_tokens=8), completions=16,
        optim=functools.partial(torch.optim.AdamW, lr=3e-3), steps=20, beta=0.0,
    )  # fmt: skip
    rewards: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            rewards.append(float(trainer.callback_metrics["train/reward"]))

    torch.manual_seed(0)
    problems = [make_problem(q, s) for q, s in (("3 5", "8"), ("1 1", "2"), ("9 4", "3"))]
    trainer(tmp_path, callbacks=[Watch()]).fit(
        module, datamodule=StepDataModule(problems, [], 3, 20, None, 0)
    )
    assert len(rewards) == 20
    early, late = sum(rewards[:3]) / 3, sum(rewards[-3:]) / 3
    assert late > early + 0.5  # 6.5 → 8.0, the limit


def test_rl_with_gradient_checkpointing_takes_the_same_step(
    nano: Callable[[int], LanguageModel],
    renderer_of: Callable[[str, Any], Renderer],
    tmp_path: Path,
) -> None:
    problems = [make_problem("3 5", "8"), make_problem("1 1", "2")]
    found = []
    for gradient_checkpointing in (False, True):
        made = nano(0)
        module = teacher_rl(
            renderer_of("compact", made.tokenizer), made, completions=4,
            rollout=HFRollout(0.7, max_new_tokens=6),
            gradient_checkpointing=gradient_checkpointing,
        )  # fmt: skip
        assert made.model.model.gradient_checkpointing is gradient_checkpointing
        torch.manual_seed(0)
        trainer(tmp_path).fit(module, datamodule=StepDataModule(problems, [], 2, 2, None, 0))
        found.append(weights(made.model))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)
    assert (found[0] - weights(nano(0).model)).abs().max() > 1e-3
