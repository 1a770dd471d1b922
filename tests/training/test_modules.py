"""The training modules: cuts into micro-batches, modes, steps, the moving reference, learning."""

import copy
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from transformers import get_scheduler

from rlt.data.batches import StepDataModule
from rlt.data.problem import Problem, make_problem
from rlt.data.renderer import Renderer
from rlt.llm.finite_checks import NotFiniteError
from rlt.llm.logprobs import row_log_probs
from rlt.llm.models import LanguageModel, freeze
from rlt.rewards import Length, Reward, RewardScorer, SolutionLogProb, ThoughtKL, TokenScores
from rlt.sampling import Completion, HFRollout
from rlt.training import RL, SFT, Example, Teaching
from rlt.training.algorithms import Algorithm
from rlt.training.rollout_batch import RolloutBatch

SGD = functools.partial(torch.optim.SGD, lr=0.1)
CONSTANT = functools.partial(get_scheduler, name="constant")
PAPER: dict[str, Any] = {
    "aggregation": "sequence_mean", "objective": "clip", "ratio": "token", "epsilon_low": 0.2,
    "epsilon_high": 0.2, "beta": 0.04, "importance_weighted_k3": True, "scale_rewards": True,
    "negative_weight": 1.0,
    "mask_overlong": False, "num_iterations": 1, "minibatches": 1, "reference_update_every_steps":
    None, "reference_mix_up": 0.9,
}  # fmt: skip
PROBLEMS = [make_problem("1 + 1?", "2"), make_problem("What is 10 - 3?", "7")]


@pytest.fixture(scope="module")
def renderer(byte_tokenizer: Any, renderer_of: Callable[[str, Any], Renderer]) -> Renderer:
    return renderer_of("compact", byte_tokenizer)


def trainer(folder: Path, **options: Any) -> L.Trainer:
    return L.Trainer(
        **{
            "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
            "limit_val_batches": 0, "default_root_dir": folder,
        }
        | options
    )  # fmt: skip


def apart_from_the_cut(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics that must not depend on the cut into micro-batches."""
    of_the_cut = ("time/", "padding_fraction", "tokens_per_micro_batch")
    return {k: v for k, v in metrics.items() if not any(part in k for part in of_the_cut)}


def weights(model: Any) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


class ScriptedRollout:
    """The same completions for every prompt, of several lengths; the last one is cut by length."""

    temperature = 0.7
    max_new_tokens = 12

    def __init__(self, renderer: Renderer, texts: Sequence[str]) -> None:
        self.renderer, self.texts = renderer, texts

    def sample(
        self, model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], n: int, stop: str
    ) -> list[list[Completion]]:
        assert not model.training and n == len(self.texts) and stop == "</think>"
        ids = [self.renderer.encode(text) for text in self.texts]
        finish = ["stop" if stop in text else "length" for text in self.texts]
        return [[Completion(i, [], f) for i, f in zip(ids, finish, strict=True)] for _ in prompts]


TEXTS = ("one</think>", "a b c</think>", "</think>", "so on and on")


def paper_reward(temperature: float | None = None) -> Reward:
    terms = {
        "r_ss": SolutionLogProb({"mean": 1.0, "min": 0.01}),
        "kl": ThoughtKL({"mean": 3.0, "max": 0.03}),
    }
    return Reward(terms, temperature=temperature)


def teacher_rl(
    renderer: Renderer, teacher: LanguageModel, tokens_per_micro_batch: int = 9999,
    reward: Any = None, optim: Any = SGD, student: Any = None, rollout: Any = None,
    steps: int = 10, completions: int = len(TEXTS), gradient_checkpointing: bool = False,
    **algorithm: Any,
) -> RL:  # fmt: skip
    rollout = rollout or ScriptedRollout(renderer, TEXTS)
    reference = freeze(copy.deepcopy(teacher.model))
    scorer = RewardScorer(
        reward or paper_reward(), student or reference, renderer,
        temperature=rollout.temperature, token_budget=tokens_per_micro_batch,
    )  # fmt: skip
    return RL(
        teacher.model, renderer, reference, Teaching(renderer, scorer), rollout,
        Algorithm(**(PAPER | algorithm)), optim, CONSTANT, steps, completions, 1.0,
        tokens_per_micro_batch, samples_per_step=0,
        gradient_checkpointing=gradient_checkpointing,
    )  # fmt: skip


def scored(module: RL, problems: list[Problem]) -> RolloutBatch:
    """A rollout of the module, with its rewards."""
    rollout = module.sample(problems)
    module.score(rollout)
    return rollout


def fit_rl(module: RL, steps: int, folder: Path, **options: Any) -> L.Trainer:
    made = trainer(folder, **options)
    made.fit(module, datamodule=StepDataModule(PROBLEMS, PROBLEMS, 2, steps, None, 0))
    return made


def fit_sft(
    renderer: Renderer, language_model: LanguageModel, folder: Path, tokens_per_micro_batch: int =
    9999, steps: int = 2, optim: Any = SGD, **options: Any,
) -> dict[str, float]:  # fmt: skip
    texts = ["a", "bc", "def ghi", "j", "klmno", "p q r s", "tu", "vwxyz 123"]
    examples = [
        Example(
            renderer.teacher_prompt(make_problem("?" * (i % 3 + 1), "2")),
            renderer.encode(text),
            text,
        )
        for i, text in enumerate(texts)
    ]
    module = SFT(
        language_model.model,
        renderer,
        optim,
        CONSTANT,
        steps,
        1.0,
        tokens_per_micro_batch,
        **options,
    )
    made = trainer(folder)
    made.fit(module, datamodule=StepDataModule(examples, [], 8, steps, None, 0))
    return {name: float(value) for name, value in made.callback_metrics.items()}


# --- micro-batches ----------------------------------------------------------------------------


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


# --- modes and frozen models --------------------------------------------------------------------


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


def test_frozen_models_are_no_part_of_the_state(
    renderer: Renderer, tiny: Callable[..., LanguageModel]
) -> None:
    module = teacher_rl(renderer, tiny(0), student=freeze(tiny(5).model))
    names = set(module.state_dict())
    assert names == {f"policy.{name}" for name in module.policy.state_dict()}
    assert len(list(module.parameters())) == len(list(module.policy.parameters()))


def test_sft_trains_in_train_mode(
    renderer: Renderer, tiny: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    made, modes = tiny(0), set()
    made.model.model.register_forward_hook(
        lambda model, *_: modes.add((model.training, torch.is_grad_enabled()))
    )
    fit_sft(renderer, made, tmp_path)
    assert modes == {(True, True)} and not made.model.training


# --- steps --------------------------------------------------------------------------------------


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
            TEXTS), Algorithm(**PAPER), SGD, CONSTANT, 1, 4, None, 99,
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


# --- temperatures -------------------------------------------------------------------------------


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


# --- the moving reference -----------------------------------------------------------------------


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


# --- logs ---------------------------------------------------------------------------------------


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
    assert step == 0 and json.dumps(rows)
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


# --- learning -----------------------------------------------------------------------------------


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
