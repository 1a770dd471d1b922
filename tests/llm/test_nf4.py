"""Bases in NF4: what is computed, shared, saved, loaded again and merged."""

import copy
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rlt.config.allowed_targets import ConfigError
from rlt.llm import nf4
from rlt.llm.adapter_layers import adapter_modules, merged_copy
from rlt.llm.adapters import NoAdapter
from rlt.llm.model_sources import Adapted, Pretrained, source_at
from rlt.llm.models import LanguageModel, fingerprint, save_model
from rlt.llm.shared_weights import frozen_copy, share_equal_weights
from rlt.preflight.memory_estimate import shape_of
from tests.llm.test_adapters import base, logits, lora, train, trained_adapter

__all__ = ["base"]  # a fixture


def qlora_model(made: LanguageModel) -> LanguageModel:
    adapter = lora(quantization="nf4")
    adapter.prepare(made.model)
    adapter.add_to(made.model)
    return made


def test_linear_layers_are_held_in_four_bits_and_the_head_is_not(
    tiny: Callable[..., LanguageModel],
) -> None:
    model = tiny(1).model
    plain = copy.deepcopy(model)
    nf4.hold_in_nf4_(model, double=True)
    held = {type(module).__name__ for _, module in nf4.linear_layers(model)}
    assert held == {"Linear4bit"} and type(model.get_output_embeddings()) is torch.nn.Linear
    own, weight = model.model.layers[0].mlp.up_proj, plain.model.layers[0].mlp.up_proj.weight
    stored = own.weight.numel() + sum(
        t.numel() * t.element_size() for k, t in nf4.scales(own.weight).items() if k == "absmax"
    )
    assert stored == pytest.approx(weight.numel() * (0.5 + 1 / 64), abs=1)
    codes, state = bnb.functional.quantize_4bit(weight.data, quant_type="nf4", blocksize=64)
    expected = bnb.functional.dequantize_4bit(codes, state)
    assert (nf4.plain_linear(own).weight - expected).abs().max() < 0.02 * expected.abs().max()
    nf4.hold_plainly_(model)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_evaluation_and_training_agree_however_often_they_take_turns(
    tiny: Callable[..., LanguageModel],
) -> None:
    model = qlora_model(tiny(1)).model
    first = logits(model)
    for _ in range(2):
        torch.testing.assert_close(model.train()(torch.tensor([[5, 9]])).logits, first[:, :2],
                                   atol=1e-5, rtol=1e-5)  # fmt: skip
        assert torch.equal(logits(model), first)


def test_a_library_that_repacks_weights_is_refused(
    tiny: Callable[..., LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = bnb.nn.Linear4bit.forward

    def repacking(self: bnb.nn.Linear4bit, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = forward(self, x)
        return found if x.requires_grad else 1.5 * found

    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", repacking)
    with pytest.raises(ValueError, match="between training and evaluation"):
        nf4.hold_in_nf4_(tiny(1).model, double=True)


def test_reference_and_student_share_the_codes(tiny: Callable[..., LanguageModel]) -> None:
    model = qlora_model(tiny(1)).model
    plain = logits(model)
    reference = frozen_copy(model)
    student = tiny(1).model
    nf4.hold_in_nf4_(student, double=True)
    assert share_equal_weights(student, model) > 0
    codes = [m.model.layers[1].mlp.down_proj for m in (model, reference, student)]
    assert codes[0].base_layer.weight is codes[1].weight is codes[2].weight
    train(model)
    assert not torch.equal(logits(model), plain)
    assert torch.equal(logits(reference), plain) and torch.equal(logits(student), plain)


def test_equal_codes_with_other_scales_are_not_shared(tiny: Callable[..., LanguageModel]) -> None:
    model, twice = tiny(1).model, tiny(1).model
    with torch.no_grad():
        for _, layer in nf4.linear_layers(twice):
            layer.weight *= 2
    for one in (model, twice):
        nf4.hold_in_nf4_(one, double=False)
    own, other = model.model.layers[0].mlp.up_proj, twice.model.layers[0].mlp.up_proj
    assert torch.equal(own.weight.data, other.weight.data)
    share_equal_weights(twice, model)
    assert own.weight is not other.weight


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # by peft
def test_a_saved_adapter_is_loaded_onto_the_same_base(base: Path, tmp_path: Path) -> None:
    made = qlora_model(Pretrained(str(base)).load())
    train(made.model)
    save_model(made.model, made.tokenizer, tmp_path / "adapter")
    source = source_at(Pretrained(str(base)), str(tmp_path / "adapter"))
    assert isinstance(source, Adapted)
    loaded = source.load().model
    assert torch.equal(logits(loaded), logits(made.model))
    assert shape_of(source, None).in_nf4 > 0 and shape_of(source, NoAdapter()).in_nf4 == 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 60_000
    # The library's own way, on a base of full precision: near, as the base is not the same.
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    near = torch.cosine_similarity(logits(theirs).flatten(), logits(loaded).flatten(), dim=0)
    assert 0.5 < near < 0.999


def test_the_merged_model_computes_what_the_adapted_one_did(base: Path, tmp_path: Path) -> None:
    made = qlora_model(Pretrained(str(base)).load())
    train(made.model)
    before = fingerprint(made.model)
    merged = merged_copy(made.model)
    assert not nf4.is_in_nf4(merged) and not adapter_modules(merged)
    torch.testing.assert_close(logits(merged), logits(made.model), atol=1e-5, rtol=0)
    assert fingerprint(made.model) == before
    save_model(merged, made.tokenizer, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), logits(made.model), atol=1e-5, rtol=0)


def test_full_training_goes_on_from_the_weights_that_the_adapter_had(base: Path) -> None:
    made = qlora_model(Pretrained(str(base)).load())
    train(made.model)
    adapted = logits(made.model)
    NoAdapter().add_to(made.model)
    torch.testing.assert_close(logits(made.model), adapted, atol=1e-5, rtol=0)
    assert all(p.requires_grad for p in made.model.parameters())


def test_an_adapter_of_a_plain_base_is_not_put_on_codes(base: Path, tmp_path: Path) -> None:
    trained_adapter(base, tmp_path / "adapter")
    loaded = Adapted(Pretrained(str(base)), str(tmp_path / "adapter")).load().model
    with pytest.raises(ValueError, match="adapter whose base is not in NF4"):
        lora(quantization="nf4").prepare(loaded)


def test_without_the_library_the_config_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlt.llm.nf4.is_installed", lambda: False)
    with pytest.raises(ConfigError, match=r"quantization=nf4: .*pip install 'rlt\[qlora\]'"):
        lora(quantization="nf4")
    with pytest.raises(ValueError, match="NF4 weights need bitsandbytes"):
        nf4.bitsandbytes()  # an adapter's folder can ask for it, too
    assert lora().quantization is None
