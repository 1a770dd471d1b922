"""Log-probs and exact KL, compared with those from the full logits of the model's forward pass."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import rlt.llm.lm_head
from rlt.llm.batching import pad_rows
from rlt.llm.lm_head import check_head, chunked_exact_kl, exact_kl, logits_of
from rlt.llm.logprobs import batch_log_probs, continuation_hidden, row_log_probs
from tests.llm.architectures import CONFIGS, ROWS, SMALL, VOCAB, gradient, make, naive, weighted_sum


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
