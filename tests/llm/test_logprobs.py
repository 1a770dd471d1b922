"""Log-probs, compared with those from the full logits of the model's own forward pass."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import rlt.llm.lm_head
from rlt.llm.batching import Row, cut_rows, micro_batches, pad_rows, trunk_tokens
from rlt.llm.lm_head import check_head, chunked_exact_kl, exact_kl, logits_of
from rlt.llm.logprobs import batch_log_probs, continuation_hidden, row_log_probs, shares_prefixes

VOCAB = 40
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 64, "initializer_range": 0.4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 1, "head_dim": 8}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**SMALL),
    "qwen2": lambda: hf.Qwen2Config(**(SMALL | {"num_key_value_heads": 1})),
    "qwen3": lambda: hf.Qwen3Config(**GROUPED, tie_word_embeddings=True),
    "gemma2": lambda: hf.Gemma2Config(
        **GROUPED, final_logit_softcapping=3.0, sliding_window=4, query_pre_attn_scalar=8
    ),
    "gemma2_full": lambda: hf.Gemma2Config(  # caps its attention scores
        **GROUPED, attn_logit_softcapping=1.0, layer_types=["full_attention"] * 2,
        query_pre_attn_scalar=8, attn_implementation="eager",
    ),
    "gemma": lambda: hf.GemmaConfig(**GROUPED),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**SMALL),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ),
    "phi": lambda: hf.PhiConfig(**SMALL),  # a head with a bias
    "lfm2": lambda: hf.Lfm2Config(  # a layer with a state
        **SMALL, num_key_value_heads=2, layer_types=["conv", "full_attention"]
    ),
    "granite": lambda: hf.GraniteConfig(**SMALL, logits_scaling=4.0, attention_multiplier=0.3),
    "cohere": lambda: hf.CohereConfig(**SMALL, logit_scale=0.25),
}  # fmt: skip
ROWS: list[Row] = [
    ([1, 5, 6], [7, 8, 9, 10]),
    ([1], [11]),
    ([1, 12, 13, 14, 15, 16, 17], [18, 19]),
    ([3, 4], [20, 21, 22, 23, 24, 25, 26, 27, 28]),
    ([1, 2, 3], []),
]


def make(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    for parameter in model.parameters():  # norms and biases too are unlike their initial values
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def naive(model: Any, row: Row, temperature: float) -> Tensor:
    """The definition: full logits of one unpadded row, shifted by one."""
    prefix, continuation = row
    ids = torch.tensor([[*prefix, *continuation]])
    log_probs_TV = (model(input_ids=ids).logits[0].float() / temperature).log_softmax(-1)
    return torch.stack(
        [log_probs_TV[len(prefix) + k - 1, token] for k, token in enumerate(continuation)]
        or [torch.zeros(())]
    )[: len(continuation)]


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def model(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


@pytest.mark.parametrize("token_budget", [1, 20, 10_000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rows_are_scored_as_one_by_one_over_full_logits(
    model: Any, token_budget: int, temperature: float
) -> None:
    with torch.no_grad():
        expected = [naive(model, row, temperature) for row in ROWS]
    actual = row_log_probs(
        model, ROWS, temperature=temperature, pad_id=0, token_budget=token_budget
    )
    assert [len(values) for values in actual] == [4, 1, 2, 9, 0]
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def weighted_sum(log_probs: list[Tensor]) -> Tensor:
    """A loss that weighs every token differently."""
    flat = torch.cat(log_probs)
    return (flat * torch.linspace(-1, 2, len(flat))).sum()


def gradient(model: Any, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("positions_at_once", [1, 3, 1000])
def test_gradients_are_those_of_full_logits(
    model: Any, positions_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = gradient(model, weighted_sum([naive(model, row, 0.7) for row in ROWS]))
    monkeypatch.setattr(rlt.llm.lm_head, "MAX_LOGITS", positions_at_once * VOCAB)
    batch = pad_rows(ROWS, 0, "cpu")
    log_probs_BC, _ = batch_log_probs(model, batch, 0.7)
    per_row = [values[mask] for values, mask in zip(log_probs_BC, batch.mask_BC, strict=True)]
    actual = gradient(model, weighted_sum(per_row))
    assert actual.isfinite().all()
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


def test_no_more_logits_at_once_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    monkeypatch.setattr(rlt.llm.lm_head, "MAX_LOGITS", 3 * VOCAB + VOCAB // 2)
    logit_shapes: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(
        lambda m, i, logits: logit_shapes.append(tuple(logits.shape))
    )
    log_probs_BC, _ = batch_log_probs(model, pad_rows(ROWS, 0, "cpu"), 1.0)
    assert logit_shapes == [(3, VOCAB)] * 5 + [(1, VOCAB)]  # 4 + 1 + 2 + 9 = 16 positions
    log_probs_BC.sum().backward()
    assert max(shape[0] for shape in logit_shapes) == 3


def test_padding_is_zero_and_entropy_is_that_of_the_distribution() -> None:
    model = make("llama")
    batch = pad_rows(ROWS, 0, "cpu")
    log_probs_BC, entropy_BC = batch_log_probs(model, batch, 0.7)
    assert batch.mask_BC.sum(1).tolist() == [4, 1, 2, 9, 0]
    assert (log_probs_BC[~batch.mask_BC] == 0).all()
    assert (entropy_BC[~batch.mask_BC] == 0).all()
    prefix, continuation = ROWS[3]
    logits = model(input_ids=torch.tensor([[*prefix, *continuation]])).logits[0] / 0.7
    expected = torch.distributions.Categorical(logits=logits).entropy()[1:-1]
    torch.testing.assert_close(entropy_BC[3], expected, rtol=0, atol=1e-4)
    assert not entropy_BC.requires_grad


def test_layout_of_padded_rows() -> None:
    batch = pad_rows([([1, 2], [3]), ([4], [5, 6]), ((1, 2), [7, 8])], 9, "cpu")
    assert batch.prefix_ids_QP.tolist() == [[1, 2], [9, 4]]
    assert batch.prefix_mask_QP.tolist() == [[True, True], [False, True]]
    assert batch.owner_B.tolist() == [0, 1, 0]
    assert batch.targets_BC.tolist() == [[3, 9], [5, 6], [7, 8]]
    assert batch.mask_BC.tolist() == [[True, False], [True, True], [True, True]]


class TokensRun:
    """Counts the tokens, padding included, of a model's forward passes."""

    def __init__(self, model: Any) -> None:
        self.shapes: list[tuple[int, ...]] = []
        model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: self.shapes.append(tuple(kwargs["input_ids"].shape)),
            with_kwargs=True,
        )


# Two groups with one prefix each, of different lengths, and a row that shares its prefix with none.
GROUPS: list[Row] = [
    ([1, 5, 6, 7], [7, 8, 9, 10]),
    ([1, 12], [13, 14]),
    ([1, 5, 6, 7], [11]),
    ([1, 5, 6, 7], []),
    ([1, 12], [15, 16, 17, 18, 19]),
    ([3], [20, 21]),
]
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


@pytest.mark.parametrize("positions_at_once", [1, 3, 1000])
def test_exact_kl_with_gradient_by_definition(
    model: Any, positions_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlt.llm.lm_head.MAX_LOGITS", positions_at_once * VOCAB)
    student = make("llama", seed=1)
    batch = pad_rows(ROWS, 0, "cpu")
    with torch.no_grad():
        student_ND = continuation_hidden(student, batch)
        q_NV = (student.get_output_embeddings()(student_ND) / 0.7).log_softmax(-1)
    weights_N = torch.linspace(-1, 2, len(student_ND))

    def by_definition() -> Tensor:
        p_NV = logits_of(model, continuation_hidden(model, batch), 0.7).log_softmax(-1)
        return (p_NV.exp() * (p_NV - q_NV)).sum(-1)

    expected_N = by_definition()
    expected = gradient(model, (expected_N * weights_N).sum())
    actual_N = exact_kl(model, continuation_hidden(model, batch), student, student_ND, 0.7)
    torch.testing.assert_close(actual_N, expected_N, rtol=0, atol=1e-4)
    actual = gradient(model, (actual_N * weights_N).sum())
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


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


def test_an_empty_prefix_is_refused() -> None:
    with pytest.raises(ValueError, match="empty prefix"):
        pad_rows([([1], [2]), ([], [3])], 0, "cpu")


def test_a_bfloat16_model_gives_float32_log_probs() -> None:
    model = make("llama").to(torch.bfloat16)
    actual = row_log_probs(model, ROWS[:1], temperature=1.0, pad_id=0, token_budget=99)[0]
    assert actual.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(actual, naive(model, ROWS[0], 1.0), rtol=0, atol=1e-2)


def test_exact_kl_is_the_dense_sum_over_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = make("llama"), make("gemma2", seed=1)
    monkeypatch.setattr(rlt.llm.lm_head, "MAX_LOGITS", 5 * VOCAB)
    batch = pad_rows(ROWS, 0, "cpu")
    actual_N = chunked_exact_kl(
        p, continuation_hidden(p, batch), q, continuation_hidden(q, batch), temperature=0.7
    )
    expected = []
    for prefix, continuation in ROWS:
        ids = torch.tensor([[*prefix, *continuation]])
        for position in range(len(prefix) - 1, ids.shape[1] - 1):
            with torch.no_grad():
                p_V, q_V = (m(input_ids=ids).logits[0, position] / 0.7 for m in (p, q))
            p_V, q_V = p_V.double().softmax(-1), q_V.double().softmax(-1)
            expected.append(float((p_V * (p_V / q_V).log()).sum()))
    assert actual_N.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert min(expected) > 0.1
    assert len(actual_N) == 16
    assert not actual_N.requires_grad
    nothing = pad_rows([([1], [])], 0, "cpu")
    hidden = continuation_hidden(p, nothing)
    assert chunked_exact_kl(p, hidden, p, hidden, 1.0).tolist() == []


ROW_LENGTHS = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), min_size=1, max_size=20)


@given(ROW_LENGTHS, st.integers(1, 200))
def test_every_row_once_and_padded_area_within_the_budget(
    lengths: list[tuple[int, int]], token_budget: int
) -> None:
    rows: list[Row] = [([1] * p, [2] * c) for p, c in lengths]
    batches = cut_rows(rows, token_budget, shared=False)
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    totals = [sum(lengths[batch[0]]) for batch in batches]
    assert totals == sorted(totals, reverse=True)
    for batch in batches:
        P, C = (max(lengths[i][side] for i in batch) for side in (0, 1))
        assert len(batch) == 1 or len(batch) * (P + C) <= token_budget


@given(ROW_LENGTHS, st.integers(1, 200))
def test_shared_prefixes_count_once(lengths: list[tuple[int, int]], token_budget: int) -> None:
    rows: list[Row] = [([1] * (p % 3 + 1), [2] * c) for p, c in lengths]
    batches = cut_rows(rows, token_budget, shared=True)
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    for batch in batches:
        prefixes = {len(rows[i][0]) for i in batch}
        C = max(len(rows[i][1]) for i in batch)
        assert len(batch) == 1 or len(prefixes) * max(prefixes) + len(batch) * C <= token_budget


def test_rows_of_a_prefix_stay_together() -> None:
    # Two prefixes of 4 and rows of 2: 4 + 3 × 2 = 10 for one group, 2 × 4 + 6 × 2 = 20 for both.
    a, b = [1, 1, 1, 1], [2, 2, 2, 2]
    rows: list[Row] = [(prefix, [9, 9]) for prefix in (a, b, a, b, a, b)]
    assert cut_rows(rows, 10, shared=True) == [[0, 2, 4], [1, 3, 5]]
    assert cut_rows(rows, 20, shared=True) == [[0, 2, 4, 1, 3, 5]]
    assert cut_rows(rows, 20, shared=False) == [[0, 1, 2], [3, 4, 5]]


def test_micro_batches_by_hand() -> None:
    # The longest rows come first. A row of 20 exceeds the budget and gets its own batch; then come
    # two rows of 5, which make 10, and three rows of 2.
    assert micro_batches([2, 5, 20, 4, 2, 1], 10) == [[2], [1, 3], [0, 4, 5]]
    # 6 + 1 and 1 + 6 tokens are 7 each, but side by side they are padded to 12.
    assert cut_rows([([1] * 6, [1]), ([1], [1] * 6)], 20, shared=False) == [[0], [1]]
    assert cut_rows([([1] * 6, [1]), ([1], [1] * 6)], 24, shared=False) == [[0, 1]]
    assert micro_batches([], 10) == []
    with pytest.raises(ValueError, match="tokens_per_micro_batch=0"):
        micro_batches([1], 0)


def test_visit_sees_every_row_with_its_own_hidden_states() -> None:
    model = make("llama")
    visited: dict[int, Tensor] = {}

    def visit(indices: list[int], batch: Any, hidden_ND: Tensor) -> None:
        parts = hidden_ND.split([len(ROWS[i][1]) for i in indices])
        visited.update(zip(indices, parts, strict=True))

    row_log_probs(model, ROWS, temperature=1.0, pad_id=0, token_budget=40, visit=visit)
    assert sorted(visited) == [0, 1, 2, 3, 4]
    for index, (prefix, continuation) in enumerate(ROWS):
        with torch.no_grad():
            out = model.model(input_ids=torch.tensor([[*prefix, *continuation]]))
        expected = out.last_hidden_state[0, len(prefix) - 1 : -1]
        torch.testing.assert_close(visited[index], expected[: len(continuation)], rtol=0, atol=1e-4)


@pytest.mark.parametrize("initializer_range", [0.4, 0.001])
def test_a_head_that_is_not_understood_is_refused(initializer_range: float) -> None:
    class Scaled(hf.LlamaForCausalLM):
        factor = 1.0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * self.factor
            return out

    torch.manual_seed(0)
    model = Scaled(hf.LlamaConfig(**(SMALL | {"initializer_range": initializer_range})))
    check_head(model)
    model.factor = 1.1
    with pytest.raises(ValueError, match="Scaled: logits are not a plain head"):
        check_head(model)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_heads_that_are_understood(name: str) -> None:
    check_head(make(name))
