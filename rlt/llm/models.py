"""Language models and their tokenizers, from a hub id, a folder, a packaged GGUF file or nothing.

Each file in `conf/model/` names one of the sources below; `teacher_path` and `student_path` replace
its weights with a folder that an earlier stage has written.
"""

import contextlib
import hashlib
import importlib.util
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from rlt.llm.logprobs import check_head

# transformers takes the name of a hub repository as well, and runs the code that it finds there.
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
_PAD_CANDIDATES = ("<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>", "<pad>", "[PAD]")


@dataclass
class LanguageModel:
    """A causal language model with its tokenizer, in eval mode."""

    model: Any
    tokenizer: Any


class ModelSource(Protocol):
    """Where a model comes from; `tokenizer` and `configuration` read no weights."""

    def tokenizer(self) -> Any: ...

    def configuration(self) -> Any: ...

    def load(self) -> LanguageModel: ...


@dataclass
class Pretrained:
    """A Hugging Face hub id or local folder.

    Args:
        path: hub id, or a folder with `config.json`.
        dtype: `float32`, `bfloat16`, `float16`, or `auto` for the checkpoint's own.
        attention: attention implementation of transformers.
        chat_template: Jinja text, or a file holding it; null keeps the tokenizer's own.
        pad_token: null keeps the tokenizer's own, else takes a spare token, else EOS.
        gguf_file: file name of a GGUF inside `path`.
        revision: git revision on the hub.
    """

    path: str
    dtype: str = "float32"
    attention: str = "sdpa"
    chat_template: str | None = None
    pad_token: str | None = None
    gguf_file: str | None = None
    revision: str | None = None

    def _options(self) -> dict[str, Any]:
        folder = Path(self.path)
        if (folder.is_absolute() or self.path.startswith(".")) and not folder.is_dir():
            raise FileNotFoundError(
                f"model path {self.path}: no such folder; give a hub id, or a folder with "
                "config.json such as <run>/model"
            )
        check_attention(self.attention)
        options: dict[str, Any] = {"trust_remote_code": False}
        options |= {"revision": self.revision} if self.revision else {}
        return options | ({"gguf_file": self.gguf_file} if self.gguf_file else {})

    def tokenizer(self) -> Any:
        """Load the tokenizer alone.

        Raises:
            FileNotFoundError: `path` looks like a folder and is none.
            ValueError: the tokenizer has no EOS token, or `pad_token` is not in its vocabulary.
        """
        with _data_alone(self.path):
            tokenizer = AutoTokenizer.from_pretrained(self.path, **self._options())
        return prepare_tokenizer(tokenizer, self.chat_template, self.pad_token)

    def configuration(self) -> Any:
        """transformers' config of the model."""
        with _data_alone(self.path):
            config = AutoConfig.from_pretrained(self.path, **self._options())
        config._attn_implementation = self.attention  # the folder's own may name code on a hub
        return config

    def load(self) -> LanguageModel:
        tokenizer = self.tokenizer()
        config = self.configuration()
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        with _data_alone(self.path):
            model: Any = AutoModelForCausalLM.from_pretrained(
                self.path, config=config, dtype=dtype, attn_implementation=self.attention,
                use_safetensors=True, **self._options(),
            )  # fmt: skip
        if self.gguf_file:
            # The weights are dequantised on loading; what is saved is an ordinary checkpoint.
            model.config.__dict__.pop("quantization_config", None)
            model.hf_quantizer = None
        return _ready(model, tokenizer)


@dataclass
class Packaged:
    """A GGUF file that an installed Python package carries, for machines without a hub.

    Args:
        package: importable name of the package; it is located, never imported.
        file: GGUF file inside it.
    """

    package: str
    file: str
    install: str
    dtype: str = "float32"
    attention: str = "sdpa"
    chat_template: str | None = None
    pad_token: str | None = None

    def _source(self) -> Pretrained:
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(
                f"model package {self.package!r} is not installed: pip install {self.install}"
            )
        folder = Path(spec.submodule_search_locations[0])
        return Pretrained(
            path=str(folder),
            dtype=self.dtype,
            attention=self.attention,
            chat_template=self.chat_template,
            pad_token=self.pad_token,
            gguf_file=self.file,
        )

    def tokenizer(self) -> Any:
        return self._source().tokenizer()

    def configuration(self) -> Any:
        return self._source().configuration()

    def load(self) -> LanguageModel:
        return self._source().load()


@dataclass
class RandomLlama:
    """A randomly initialised Llama over a tokenizer made on the spot.

    Args:
        make_tokenizer: a function of `rlt.llm.tokenizers` (config: `_target_` with `_partial_`).
        initializer_range: standard deviation of the weights; tiny models want more than 0.02.
        seed: of the initial weights.
    """

    make_tokenizer: Any
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

    def tokenizer(self) -> Any:
        check_attention(self.attention)
        return prepare_tokenizer(self.make_tokenizer(), self.chat_template, self.pad_token)

    def configuration(self) -> Any:
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
        config = self.configuration()
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = LlamaForCausalLM(config).to(getattr(torch, self.dtype))
        return _ready(model, self.tokenizer())


@contextlib.contextmanager
def _data_alone(path: str) -> Iterator[None]:
    """A model that would bring code is refused: classes of its own, or weights that are pickles."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"model path {path}: it comes with code of its own, which is never run; choose a model "
            "of an architecture that transformers has"
        ) from error
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        raise ValueError(
            f"model path {path}: it has no model.safetensors, and other weight files are never "
            "read, as they can run code; convert it with transformers' save_pretrained"
        ) from error


def check_attention(name: str) -> None:
    """Raises ValueError for an attention implementation that is none of transformers' own."""
    if name not in ATTENTION:
        raise ValueError(f"attention={name}: choose {', '.join(ATTENTION)}")


def source_at(source: Any, path: str | None) -> ModelSource:
    """The source itself, or the folder `path` read with the source's dtype and attention.

    The folder's own chat template stands, unless the config names one.
    """
    if path is None:
        return source
    if isinstance(source, Pretrained):
        return replace(source, path=path, gguf_file=None, revision=None)
    return Pretrained(path, source.dtype, source.attention, source.chat_template, source.pad_token)


def prepare_tokenizer(tokenizer: Any, chat_template: str | None, pad_token: str | None) -> Any:
    """Settle chat template, EOS and padding of any family's tokenizer.

    Raises:
        ValueError: there is no EOS token, or `pad_token` is not in the vocabulary.
    """
    if chat_template is not None:
        file = Path(chat_template) if re.fullmatch(r"[^\n{}]{1,255}", chat_template) else None
        if file is not None and not file.is_file():
            raise ValueError(
                f"chat_template={chat_template!r} is neither a Jinja template nor a file"
            )
        tokenizer.chat_template = file.read_text(encoding="utf-8") if file else chat_template
    if tokenizer.eos_token is None:
        raise ValueError(f"the tokenizer of {tokenizer.name_or_path!r} has no EOS token")
    vocabulary = tokenizer.get_vocab()
    if pad_token is not None:
        if pad_token not in vocabulary:
            raise ValueError(f"pad_token={pad_token!r} is not in the tokenizer's vocabulary")
        tokenizer.pad_token = pad_token
    elif tokenizer.pad_token is None:
        # Masks are made from lengths, so even EOS is safe to pad with.
        spare = [t for t in _PAD_CANDIDATES if t in vocabulary and t != tokenizer.eos_token]
        tokenizer.pad_token = spare[0] if spare else tokenizer.eos_token
    return tokenizer


def _ready(model: PreTrainedModel, tokenizer: Any) -> LanguageModel:
    model.config.pad_token_id = tokenizer.pad_token_id
    check_head(model.eval())
    return LanguageModel(model, tokenizer)


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write weights (safetensors), config and tokenizer as a Hugging Face folder.

    A folder of that name is either whole or not there; one of an earlier run is replaced.
    """
    unfinished = folder.with_name(f"{folder.name}.tmp")
    for old in (unfinished, folder):
        shutil.rmtree(old, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.replace(folder)


def freeze(model: nn.Module) -> nn.Module:
    """Eval mode without gradients: what every scorer and reference is in."""
    return model.eval().requires_grad_(False)


def fingerprint(model: nn.Module) -> str:
    """Hex digest of length 16 over the names and values of the weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()  # a scalar cannot be viewed as bytes
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def context_tokens(model: nn.Module) -> int:
    """The longest sequence, in tokens, that the model's config admits."""
    return context_of(model.config)


def context_of(config: Any) -> int:
    """The same of a config alone."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", 2**31 - 1))
