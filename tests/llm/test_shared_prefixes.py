"""Prefixes that rows share are run once, and change no log-prob and no gradient."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from rlt.llm.batching import Row, pad_rows, trunk_tokens
from rlt.llm.logprobs import (
    batch_log_probs,
    continuation_hidden,
    row_log_probs,
    shares_prefixes,
)
from tests.llm.architectures import (
    CONFIGS,
    GROUPS,
    ROWS,
    VOCAB,
    TokensRun,
    gradient,
    make,
    naive,
    weighted_sum,
)

SHARING = {
    "llama",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2_full",
    "gpt_neox",
    "gpt2",
    "phi",
    "granite",
    "cohere",
}


@pytest.mark.parametrize("token_budget", [1, 24, 10_000])
def test_a_shared_prefix_changes_no_log_prob(model: Any, token_budget: int) -> None:
    with torch.no_grad():
        expected = [naive(model, row, 0.7) for row in GROUPS]
    actual = row_log_probs(model, GROUPS, temperature=0.7, pad_id=0, token_budget=token_budget)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_gradients_flow_through_a_shared_prefix(model: Any) -> None:
    expected = gradient(model, weighted_sum([naive(model, row, 0.7) for row in GROUPS]))
    batch = pad_rows(GROUPS, 0, "cpu")
    log_probs_BC, _ = batch_log_probs(model, batch, 0.7)
    per_row = [values[mask] for values, mask in zip(log_probs_BC, batch.mask_BC, strict=True)]
    actual = gradient(model, weighted_sum(per_row))
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_prefixes_run_once_where_the_cache_can_be_expanded(name: str) -> None:
    model = make(name)
    assert shares_prefixes(model) == (name in SHARING)
    run = TokensRun(model)
    continuation_hidden(model, pad_rows(GROUPS, 0, "cpu"))
    assert run.shapes == ([(3, 4), (6, 4)] if name in SHARING else [(6, 9)])
    # No prefix is shared, so there is one pass, because two passes would only cost more.
    run.shapes.clear()
    continuation_hidden(model, pad_rows(ROWS, 0, "cpu"))
    assert run.shapes == [(5, 16)]


# Prefixes of different lengths that begin with the same 45 tokens; two rows share a whole prefix.
SYSTEM = [(7 * n) % (VOCAB - 1) + 1 for n in range(45)]
TRUNK: list[Row] = [
    ([*SYSTEM, 5], [3, 1, 4]),
    ([*SYSTEM, 6, 2, 9, 8], [1, 5]),
    ([*SYSTEM, 8, 8], [3]),
    ([*SYSTEM, 7, 1], [2, 2]),
    ([*SYSTEM, 6, 2, 9, 8], [9, 2, 6, 5]),
]


def test_what_all_prefixes_begin_with_is_run_once(model: Any) -> None:
    with torch.no_grad():
        expected = [naive(model, row, 0.7) for row in TRUNK]
    actual = row_log_probs(model, TRUNK, temperature=0.7, pad_id=0, token_budget=10_000)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_gradients_flow_through_the_trunk(model: Any) -> None:
    expected = gradient(model, weighted_sum([naive(model, row, 0.7) for row in TRUNK]))
    batch = pad_rows(TRUNK, 0, "cpu")
    log_probs_BC, _ = batch_log_probs(model, batch, 0.7)
    per_row = [values[mask] for values, mask in zip(log_probs_BC, batch.mask_BC, strict=True)]
    actual = gradient(model, weighted_sum(per_row))
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


def test_a_trunk_is_run_where_that_saves_enough() -> None:
    model = make("llama")
    run = TokensRun(model)
    continuation_hidden(model, pad_rows(TRUNK, 0, "cpu"))
    assert run.shapes == [(1, 45), (4, 4), (5, 3)]
    # Sharing the 45 common tokens of two prefixes saves 45, too few for a pass of their own.
    run.shapes.clear()
    continuation_hidden(model, pad_rows(TRUNK[:2], 0, "cpu"))
    assert run.shapes == [(2, 52)]


def test_a_trunk_ends_before_the_last_token_of_any_prefix() -> None:
    assert trunk_tokens([[1, 2, 3], [1, 2, 4, 5]]) == 2
    assert trunk_tokens([[1, 2, 3], [1, 2, 3, 4]]) == 2
    assert trunk_tokens([[1], [1, 2]]) == 0
    assert trunk_tokens([[1, 2, 3]]) == 2


@pytest.mark.parametrize("continuations", [[[7], [8]], [[], [8]], [[], []]])
def test_continuations_of_at_most_one_token_need_the_prefix_alone(
    continuations: list[list[int]],
) -> None:
    model = make("llama")
    rows: list[Row] = [([1, 5, 6], c) for c in continuations]
    run = TokensRun(model)
    actual = row_log_probs(model, rows, temperature=1.0, pad_id=0, token_budget=100)
    assert run.shapes == [(1, 3)]
    for one, row in zip(actual, rows, strict=True):
        torch.testing.assert_close(one, naive(model, row, 1.0), rtol=0, atol=1e-4)


def test_a_recurrent_state_is_not_shared() -> None:
    config = hf.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2)
    assert not shares_prefixes(hf.AutoModelForCausalLM.from_config(config))


def test_gradient_checkpointing_runs_rows_whole_in_training_alone() -> None:
    model = make("llama")
    batch = pad_rows(GROUPS, 0, "cpu")
    mask_BC = batch.mask_BC

    def loss() -> Tensor:
        return weighted_sum([batch_log_probs(model, batch, 0.7)[0][mask_BC]])

    expected = gradient(model, loss())
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert shares_prefixes(model)  # scoring, in eval mode
    model.train()
    assert not shares_prefixes(model)
    run = TokensRun(model)
    actual = gradient(model, loss())
    assert run.shapes == [(6, 9)]
    assert (actual - expected).norm() <= 1e-5 * expected.norm()
