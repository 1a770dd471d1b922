"""A model source without any download: a Llama model with random weights."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from rlt.llm.model_sources import check_attention, ready_model
from rlt.llm.models import LanguageModel, prepare_tokenizer


@dataclass
class RandomLlama:
    """A randomly initialised Llama model with a tokenizer that needs no download.

    Args:
        make_tokenizer: a function of `rlt.llm.tokenizers` (config: `_target_` with `_partial_`).
        hidden_size: width of the hidden states.
        layers: number of layers.
        heads: number of attention heads; every head has its own keys and values.
        intermediate_size: width of the feed-forward layers.
        max_tokens: length of the longest sequence.
        initializer_range: standard deviation of the initial weights. Tiny models learn better with
            a value above the usual 0.02.
        seed: seed of the initial weights.
        tie_embeddings: whether the head uses the weights of the input embedding.
        dtype: see `Pretrained`.
        attention: see `Pretrained`.
        chat_template: see `Pretrained`.
        pad_token: see `Pretrained`.
    """

    make_tokenizer: Callable[[], PreTrainedTokenizerBase]
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    max_tokens: int
    initializer_range: float
    seed: int
    tie_embeddings: bool = False
    dtype: str = "float32"
    attention: str = "sdpa"
    chat_template: str | None = None
    pad_token: str | None = None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Make the tokenizer.

        Raises:
            ValueError: `attention` is unknown, or `pad_token` is not in the vocabulary.
        """
        check_attention(self.attention)
        return prepare_tokenizer(self.make_tokenizer(), self.chat_template, self.pad_token)

    def configuration(self) -> LlamaConfig:
        """Make transformers' config of the model.

        Raises:
            ValueError: see `tokenizer`.
        """
        tokenizer = self.tokenizer()
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=self.max_tokens,
            initializer_range=self.initializer_range,
            tie_word_embeddings=self.tie_embeddings,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        config._attn_implementation = self.attention
        return config

    def load(self) -> LanguageModel:
        """Initialise the weights and make the tokenizer. The global random state is not changed.

        Raises:
            ValueError: see `tokenizer`.
        """
        config = self.configuration()
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = LlamaForCausalLM(config).to(getattr(torch, self.dtype))
        return ready_model(model, self.tokenizer())
