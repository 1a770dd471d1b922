"""Small models of every architecture, and log-probs of rows by definition."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from rlt.llm.batching import Row

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


def weighted_sum(log_probs: list[Tensor]) -> Tensor:
    """A loss that weighs every token differently."""
    flat = torch.cat(log_probs)
    return (flat * torch.linspace(-1, 2, len(flat))).sum()


def gradient(model: Any, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


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
