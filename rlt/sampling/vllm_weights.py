"""A policy's weights on their way to vLLM servers, as files."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlt.llm.adapter_layers import adapter_config
from rlt.llm.models import save_model
from rlt.runs.files import read_json, write_json

_METADATA = {"format": "pt"}
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that servers can be started with


def marks_of(model: PreTrainedModel) -> Tensor:
    """Two numbers of each weight, by which changed weights are told from unchanged ones.

    Counters of changes would not do: fused optimizers of torch leave `Tensor._version` as it is.
    """
    numbers = [
        mark
        for p in model.parameters()
        if p.is_floating_point()  # codes of NF4 are never changed
        for mark in (p.sum(dtype=torch.float64), torch.linalg.vector_norm(p, dtype=torch.float64))
    ]
    return torch.stack(numbers).cpu()


def save_for_servers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Save a model for servers, with a head of its own where the embeddings serve as the head.

    vLLM packs the head for CPUs when it starts, and packs it anew only if new weights name it.
    """
    save_model(model, tokenizer, folder)
    config, head = folder / "config.json", model.get_output_embeddings().weight
    settings = read_json(config)
    if not settings.get("tie_word_embeddings"):
        return
    assert isinstance(head, Tensor)
    own = {"lm_head.weight": head.detach().cpu().contiguous()}
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        save_file(own, folder / "head.safetensors", metadata=_METADATA)
        listed = read_json(index)
        listed["weight_map"]["lm_head.weight"] = "head.safetensors"
        write_json(index, listed)
    else:
        save_file(load_file(whole) | own, whole, metadata=_METADATA)
    write_json(config, settings | {"tie_word_embeddings": False})


def server_rank(model: PreTrainedModel) -> int:
    """A rank that servers can be started with, no smaller than the adapter's."""
    rank = int(adapter_config(model).r)
    return next(size for size in _RANKS if size >= rank)
