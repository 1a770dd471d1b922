"""Prompts, samples from them, and a model with known continuations."""

import itertools
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlt.llm.batching import Row
from rlt.llm.models import LanguageModel
from rlt.sampling import Completion, HFRollout

NEVER = "\x00\x01\x02"  # a stop string that does not occur


def prompts_of(tokenizer: Any) -> list[list[int]]:
    texts = ["a", "What is 1+1?", "Why", "Tell me all about it, please."]
    return [tokenizer(text)["input_ids"] for text in texts]


def sample(
    language_model: LanguageModel, rollout: HFRollout, n: int, stop: str = NEVER, seed: int = 0
) -> list[list[Completion]]:
    torch.manual_seed(seed)
    tokenizer = language_model.tokenizer
    rollout.prepare(language_model.model, tokenizer)
    return rollout.sample(language_model.model, tokenizer, prompts_of(tokenizer), n, stop)


def rows_of(language_model: LanguageModel, groups: list[list[Completion]]) -> list[Row]:
    prompts = prompts_of(language_model.tokenizer)
    return [(prompt, c.ids) for prompt, g in zip(prompts, groups, strict=True) for c in g]


def follow(tokenizer: Any, *chains: list[int]) -> Any:
    """A model that follows chains of tokens: the next token is a function of the last.

    Its layer adds nothing; each token of a chain has a direction of its own, which the head maps to
    the successor. All others have direction 0 and are followed by token 0.
    """
    successor = {a: b for chain in chains for a, b in itertools.pairwise(chain)}
    size = 2 * (len(successor) // 2 + 1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=size, num_hidden_layers=1,
            num_attention_heads=1, intermediate_size=4, pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()  # fmt: skip
    for parameter in model.model.layers.parameters():
        parameter.data.zero_()
    embedding, head = model.model.embed_tokens.weight.data, model.lm_head.weight.data
    embedding.zero_(), head.zero_()
    embedding[:, 0] = 1.0
    head[0, 0] = 50.0
    for direction, (token, following) in enumerate(successor.items(), start=1):
        embedding[token] = torch.nn.functional.one_hot(torch.tensor(direction), size)
        head[following, direction] = 50.0
    return model


def ids_of(tokenizer: Any, text: str) -> list[int]:
    actual: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return actual
