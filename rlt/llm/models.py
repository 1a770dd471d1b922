"""Prepares, freezes, fingerprints and saves a language model and its tokenizer.

`rlt.llm.model_sources` loads or initialises the models.
"""

import hashlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlt.llm.nf4 import write_nf4_file

Model = TypeVar("Model", bound=nn.Module)

_PAD_CANDIDATES = ("<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>", "<pad>", "[PAD]")


@dataclass
class LanguageModel:
    """A causal language model with its tokenizer.

    Attributes:
        model: the model, in eval mode when a source has loaded it.
        tokenizer: its tokenizer, prepared by `prepare_tokenizer`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None, pad_token: str | None
) -> PreTrainedTokenizerBase:
    """Set the chat template and the padding token of a tokenizer of any model family.

    Args:
        tokenizer: the tokenizer; it is changed in place.
        chat_template: Jinja text, or the path of a file with it; None keeps the tokenizer's own.
        pad_token: a token of the vocabulary. None keeps the tokenizer's own; if it has none, a
            spare token is taken, and EOS if there is no spare token.

    Raises:
        ValueError: `chat_template` is neither a template nor a file, there is no EOS token, or
            `pad_token` is not in the vocabulary.
    """
    if chat_template is not None:
        file = Path(chat_template) if re.fullmatch(r"[^\n{}]{1,255}", chat_template) else None
        if file is not None and not file.is_file():
            raise ValueError(
                f"chat_template={chat_template!r} is neither a Jinja template nor a file; give "
                "the template's text or the path of an existing file"
            )
        tokenizer.chat_template = file.read_text(encoding="utf-8") if file else chat_template
    if tokenizer.eos_token is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no EOS token, so no text would end; "
            "choose a model whose tokenizer has one"
        )
    vocabulary = tokenizer.get_vocab()
    if pad_token is not None:
        if pad_token not in vocabulary:
            raise ValueError(
                f"pad_token={pad_token!r} is not in the tokenizer's vocabulary; name one of its "
                "tokens, or null for the tokenizer's own"
            )
        tokenizer.pad_token = pad_token
    elif tokenizer.pad_token is None:
        # Masks are made from lengths, never from padding ids, so even EOS can serve as padding.
        spare = [t for t in _PAD_CANDIDATES if t in vocabulary and t != tokenizer.eos_token]
        tokenizer.pad_token = spare[0] if spare else tokenizer.eos_token
    return tokenizer


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights (safetensors), config and tokenizer as a Hugging Face folder.

    The folder appears only once it is complete. A folder of the same name is replaced.
    """
    unfinished = folder.with_name(f"{folder.name}.tmp")
    for old in (unfinished, folder):
        shutil.rmtree(old, ignore_errors=True)
    model.save_pretrained(unfinished)
    write_nf4_file(model, unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.replace(folder)


def freeze(model: Model) -> Model:
    """Put a model into eval mode and switch its gradients off, as scorers and references need."""
    return model.eval().requires_grad_(False)


def fingerprint(model: nn.Module) -> str:
    """Return a hex digest of 16 characters over the names and values of the weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()  # a scalar cannot be viewed as bytes
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def context_tokens(model: PreTrainedModel) -> int:
    """Return the length, in tokens, of the longest sequence that the model accepts."""
    return context_of(model.config)


def context_of(config: PreTrainedConfig) -> int:
    """Return the length, in tokens, of the longest sequence that a model of this config accepts.

    A config that names no limit counts as 2^31 - 1 tokens.
    """
    return int(getattr(config.get_text_config(), "max_position_embeddings", 2**31 - 1))
