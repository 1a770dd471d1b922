"""FLOPs of a tiny model, compared with a count by hand."""

from types import SimpleNamespace

import pytest
import torch
import transformers as hf

from rlt.llm import flop_count
from rlt.llm.batching import padding_fraction
from rlt.llm.flop_count import forward_flops, matmul_flops_per_second

SIZES = {
    "vocab_size": 10, "hidden_size": 4, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "intermediate_size": 6,
}  # fmt: skip
# Per layer: q, k, v, o of 4 × 4, MLP of 3 × 4 × 6, two norms of 4; then the last norm.
BODY = 3 * (4 * 16 + 3 * 24 + 2 * 4) + 4
ROWS = [([1, 2, 3], [4, 5]), ([1, 2, 3], [6]), ([7], [8, 9, 5, 4])]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_flops_of_a_forward_pass(shared: bool, tied: bool) -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=tied))
    tokens = 7 + 3 + 1 + (0 if shared else 3)  # continuations, and each prefix once or per row
    prefix_pairs = 9 / 2 + 1 / 2 + (0 if shared else 9 / 2)
    pairs = prefix_pairs + (2 * 3 + 4 / 2) + (1 * 3 + 1 / 2) + (4 * 1 + 16 / 2)
    expected = 2 * BODY * tokens + 2 * 40 * 7 + 4 * 3 * 4 * pairs
    assert forward_flops(model, ROWS, shared) == pytest.approx(expected)


def test_padding_by_hand() -> None:
    # In one batch, prefixes of 3 and 1 are padded to 2 × 3 tokens and continuations to 3 × 4. The
    # real tokens are 4 and 7.
    assert padding_fraction(ROWS, [[0, 1, 2]], shared=True) == pytest.approx(1 - 11 / 18)
    # In a batch of its own, the last row needs no padding: 2 × 3 + 2 × 2 tokens hold 6 and 3 real
    # ones.
    assert padding_fraction(ROWS, [[0, 1], [2]], shared=False) == pytest.approx(1 - 14 / 15)


def test_the_rate_is_that_of_the_fastest_of_several_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The clock: when to stop; then begin and end of each product, and whether the time is up.
    clock = iter([0.0, 1.0, 1.5, 1.6, 1.7, 1.95, 1.99, 2.0, 3.0, 3.1])
    monkeypatch.setattr(flop_count, "_SIZE", 8)
    monkeypatch.setattr(flop_count, "_SECONDS", 2.0)
    monkeypatch.setattr(flop_count, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    rate = matmul_flops_per_second.__wrapped__(torch.device("cpu"), torch.float32)
    assert rate == pytest.approx(2 * 8**3 / 0.25)  # products of 0.5, 0.25 and 1 second
    assert list(clock) == []
