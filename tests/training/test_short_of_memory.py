"""Memory runs out above some number of padded tokens, and the results must be the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlt.data.problem import make_problem
from rlt.data.renderer import Renderer
from rlt.llm.models import LanguageModel, freeze
from rlt.llm.token_budget import OutOfMemoryError
from rlt.rewards import Reward, RewardScorer, ScoredExplanation, ThoughtKL
from rlt.sampling import Completion, HFRollout
from tests.training.fitting import apart_from_the_cut, fit_rl, fit_sft, teacher_rl, weights

NEVER = "\x00\x01\x02"  # a stop string that does not occur


def short_of_memory(model: Any, tokens: int) -> list[int]:
    """Let a forward pass of the model run out of memory above a number of tokens, cache included.

    Returns:
        How many tokens each forward pass was asked for that failed, as a list that grows.
    """
    failed: list[int] = []

    def limit(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        asked = kwargs["attention_mask"].numel()
        if asked > tokens:
            failed.append(asked)
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {asked} tokens\n…")

    model.base_model.register_forward_pre_hook(limit, with_kwargs=True)
    return failed


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Callable[[], int]:
    """How often a budget was lowered."""
    return lambda: sum("not enough memory for" in r.message for r in caplog.records)


def test_training_is_the_same(
    renderer: Renderer,
    tiny: Callable[..., LanguageModel],
    tmp_path: Path,
    warned: Callable[[], int],
) -> None:
    whole, limited = tiny(0), tiny(0)
    before = weights(whole.model)
    expected = fit_sft(renderer, whole, tmp_path)
    failed = short_of_memory(limited.model, 60)
    actual = fit_sft(renderer, limited, tmp_path)
    assert (weights(whole.model) - before).abs().max() > 1e-3
    torch.testing.assert_close(weights(limited.model), weights(whole.model), rtol=0, atol=1e-6)
    assert apart_from_the_cut(actual) == pytest.approx(apart_from_the_cut(expected), abs=1e-5)
    assert len(failed) == warned() >= 1  # the first step lowers the budget, the second step uses it
    name = "train/tokens_per_micro_batch"
    assert actual[name] < expected[name] == 9999


def test_a_half_done_batch_leaves_no_gradient(
    renderer: Renderer,
    tiny: Callable[..., LanguageModel],
    tmp_path: Path,
    warned: Callable[[], int],
) -> None:
    """Memory runs out in the third backward pass: two micro-batches have left their gradients."""
    whole, limited = tiny(0), tiny(0)
    fit_sft(renderer, whole, tmp_path, steps=1)
    passes = []

    def limit(gradient: Tensor) -> None:
        passes.append(1)
        if len(passes) == 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    limited.model.model.norm.weight.register_hook(limit)
    fit_sft(renderer, limited, tmp_path, tokens_per_micro_batch=40, steps=1)
    assert warned() == 1
    assert len(passes) > 3
    torch.testing.assert_close(weights(limited.model), weights(whole.model), rtol=0, atol=1e-6)


def test_rl_is_the_same(
    renderer: Renderer,
    tiny: Callable[..., LanguageModel],
    tmp_path: Path,
    warned: Callable[[], int],
) -> None:
    """Memory runs out for the policy, the reference and the student of the reward."""
    results: list[tuple[Tensor, dict[str, float]]] = []
    failures: list[list[int]] = []
    for tokens in (10_000, 150):
        limited, student = tiny(0), freeze(tiny(5).model)
        module = teacher_rl(renderer, limited, student=student, num_iterations=2)
        models = (limited.model, student, module.reference)
        failed = [short_of_memory(model, tokens) for model in models]
        metrics = fit_rl(module, 2, tmp_path).callback_metrics
        failures.append([len(one) for one in failed])
        results.append(
            (weights(limited.model), apart_from_the_cut({k: float(v) for k, v in metrics.items()}))
        )
    assert failures[0] == [0, 0, 0]
    assert failures[1][0] >= 1
    assert failures[1][1] >= 1
    assert warned() == sum(failures[1])
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=1e-6)
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-5, abs=1e-4)


def test_scores_are_the_same(
    renderer: Renderer, tiny: Callable[..., LanguageModel], warned: Callable[[], int]
) -> None:
    """The exact KL is included, which a visitor computes from the student's hidden states."""
    student, teacher = freeze(tiny(5).model), freeze(tiny(6).model)
    reward = Reward({"kl": ThoughtKL({"mean": 1.0, "max": 1.0}, estimator="exact")})
    rows = []
    for question, thought in [("1+1?", "so"), ("2+2?", "two and two"), ("3+3?", "x"), ("4?", "")]:
        problem = make_problem(question, "7")
        explanation = renderer.explanation(renderer.encode(thought + renderer.stop))
        rows.append(ScoredExplanation(problem, explanation, renderer.teacher_prompt(problem), None))

    def table() -> Any:
        scorer = RewardScorer(reward, student, renderer, temperature=0.7, token_budget=9999)
        return scorer(rows, teacher)

    expected = table()
    failed = short_of_memory(student, 60)
    actual = table()
    assert len(failed) == warned() >= 1
    assert actual.rewards == pytest.approx(expected.rewards, abs=1e-5)
    for name, column in expected.terms.items():
        assert actual.terms[name] == pytest.approx(column, abs=1e-5)


def sample(language_model: LanguageModel, rollout: HFRollout) -> list[list[Completion]]:
    texts = ["a", "What is 1+1?", "Why", "Tell me all about it, please."]
    prompts = [language_model.tokenizer(text)["input_ids"] for text in texts]
    torch.manual_seed(0)
    return rollout.sample(language_model.model, language_model.tokenizer, prompts, 4, NEVER)


def test_completions_are_those_of_the_lower_budget_from_the_start(
    tiny: Callable[..., LanguageModel], warned: Callable[[], int]
) -> None:
    plain, limited = tiny(3), tiny(3)
    failed = short_of_memory(limited.model, 200)  # reached after some tokens have been drawn
    rollout = HFRollout(1.0, max_new_tokens=24)
    actual = sample(limited, rollout)
    assert len(failed) == warned() >= 1
    lowered = rollout.token_budget.tokens
    assert actual == sample(plain, HFRollout(1.0, max_new_tokens=24, token_budget=lowered))
    # Rows get their random numbers by micro-batch, so another cut gives other completions.
    assert actual != sample(plain, HFRollout(1.0, max_new_tokens=24))


def test_greedy_completions_do_not_depend_on_the_budget(
    tiny: Callable[..., LanguageModel], warned: Callable[[], int]
) -> None:
    plain, limited = tiny(3), tiny(3)
    short_of_memory(limited.model, 200)
    actual = sample(limited, HFRollout(0.0, max_new_tokens=24))
    assert warned() >= 1
    expected = sample(plain, HFRollout(0.0, max_new_tokens=24))
    assert [[c.ids for c in g] for g in actual] == [[c.ids for c in g] for g in expected]


def test_a_row_too_long_for_the_memory_ends_the_work(tiny: Callable[..., LanguageModel]) -> None:
    limited = tiny(3)
    short_of_memory(limited.model, 30)
    with pytest.raises(OutOfMemoryError, match="even for one row at a time"):
        sample(limited, HFRollout(1.0, max_new_tokens=24))
