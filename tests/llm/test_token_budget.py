"""Memory runs out above some number of padded tokens, and the results must be the same."""

import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlt.data.problem import make_problem
from rlt.data.renderer import Renderer
from rlt.llm.batching import cut_rows
from rlt.llm.models import LanguageModel, freeze
from rlt.llm.token_budget import OutOfMemoryError, TokenBudget, is_out_of_memory
from rlt.rewards import Reward, RewardScorer, ScoredExplanation, ThoughtKL
from rlt.sampling import Completion, HFRollout
from tests.training.test_modules import (
    apart_from_the_cut,
    fit_rl,
    fit_sft,
    teacher_rl,
    weights,
)

NEVER = "\x00\x01\x02"  # a stop string that does not occur


@pytest.fixture(scope="module")
def renderer(byte_tokenizer: Any, renderer_of: Callable[[str, Any], Renderer]) -> Renderer:
    return renderer_of("compact", byte_tokenizer)


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


# --- the budget -----------------------------------------------------------------------------------

LENGTHS = [3, 9, 5, 5, 7, 1, 4, 6]
ROWS = [([1, 2], list(range(length))) for length in LENGTHS]


def cut(tokens: int) -> list[list[int]]:
    return cut_rows(ROWS, tokens, shared=False)


def test_a_budget_is_halved_until_the_work_fits_and_stays(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tried = []

    def work(tokens: int) -> Tensor:
        tried.append(tokens)
        drawn = torch.rand(2)
        if max(len(batch) for batch in cut(tokens)) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nLong story")
        return drawn

    budget = TokenBudget(4096, "hardware.tokens_per_micro_batch")
    torch.manual_seed(0)
    drawn = budget.fit(work, cut)
    # With 4096, 2048 … 128 all rows fit into one batch, so only the first of them is tried.
    assert tried == [4096, 64, 32, 16]
    assert budget.tokens == 16
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(2))  # the failed attempts left the random state unchanged
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3
    assert "for hardware.tokens_per_micro_batch=64 (CUDA out of memory. Tried to" in caplog.text
    assert "as with hardware.tokens_per_micro_batch=16 from the start" in caplog.text
    assert "Long story" not in caplog.text
    caplog.clear()
    budget.fit(work, cut)
    assert tried[4:] == [16]
    assert not caplog.records


def test_a_loop_over_micro_batches_is_begun_again_with_smaller_ones() -> None:
    budget = TokenBudget(4096, "hardware.tokens_per_micro_batch")
    for attempt in budget.attempts(cut):
        with attempt:
            done = []
            for indices in attempt.micro_batches:
                if len(indices) > 2:
                    raise MemoryError
                done.append(indices)
    assert done == cut(16) and budget.tokens == attempt.tokens == 16
    assert attempt.shortage is None


def test_nothing_is_left_to_halve() -> None:
    tried = []

    def work(tokens: int) -> None:
        tried.append(tokens)
        raise MemoryError

    with pytest.raises(
        OutOfMemoryError, match=r"\(MemoryError\), even for one row at a time"
    ) as error:
        TokenBudget(64, "hardware.tokens_per_micro_batch").fit(work, cut)
    assert all(len(batch) == 1 for batch in cut(tried[-1]))
    for remedy in ("max_new_tokens", "max_tokens", "gradient_checkpointing", "model", "hardware=…"):
        assert remedy in str(error.value)


def test_a_failed_attempt_has_freed_its_tensors_before_the_next() -> None:
    kept: list[weakref.ref[Tensor]] = []

    def work(tokens: int) -> bool:
        assert all(one() is None for one in kept)
        large = torch.zeros(tokens)
        kept.append(weakref.ref(large))
        if len(cut(tokens)[0]) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return True

    assert TokenBudget(4096, "setting").fit(work, cut)
    assert len(kept) > 2


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("any words"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: "
                      "can't allocate memory: you tried to allocate 4 bytes."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)  # fmt: skip
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_a_real_allocation_that_is_refused_counts() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert is_out_of_memory(error.value)


def test_other_errors_pass_through() -> None:
    def work(tokens: int) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        TokenBudget(64, "setting").fit(work, cut)


# --- what it holds for ----------------------------------------------------------------------------


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
