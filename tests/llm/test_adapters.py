"""LoRA adapters: what is trained, what models share, what is saved and loaded again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlt.config.allowed_targets import ConfigError
from rlt.llm.adapter_layers import adapter_modules, adapter_parameters, merged_copy
from rlt.llm.adapters import LoRA, NoAdapter
from rlt.llm.model_sources import Adapted, Pretrained, source_at
from rlt.llm.models import LanguageModel, fingerprint, freeze, save_model
from rlt.llm.shared_weights import frozen_copy, share_equal_weights

IDS = torch.tensor([[5, 9, 40, 11, 3, 77, 8]])
SETTINGS: dict[str, Any] = {
    "rank": 4, "alpha": 8, "dropout": 0.0, "targets": "all-linear", "rslora": False,
    "dtype": "float32", "lr_factor": 10.0, "merge": False, "quantization": None,
    "double_quantization": True,
}  # fmt: skip


def lora(**changes: Any) -> LoRA:
    return LoRA(**(SETTINGS | changes))


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits
    return found


def train(model: PreTrainedModel, steps: int = 3) -> None:
    """Move everything that has gradient."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()


@pytest.fixture
def base(tiny: Callable[..., LanguageModel], tmp_path: Path) -> Path:
    """Folder of a plain model."""
    made = tiny(3)
    save_model(made.model, made.tokenizer, tmp_path / "base")
    return tmp_path / "base"


def trained_adapter(base: Path, folder: Path, **changes: Any) -> PreTrainedModel:
    """A model whose adapter was trained, saved in `folder`."""
    loaded = Pretrained(str(base)).load()
    lora(**changes).add_to(loaded.model)
    train(loaded.model)
    save_model(loaded.model, loaded.tokenizer, folder)
    return loaded.model


def test_only_the_adapter_is_trained(tiny: Callable[..., LanguageModel]) -> None:
    model = tiny(1).model
    before = {name: p.clone() for name, p in model.named_parameters()}
    plain = logits(model)
    lora().add_to(model)
    assert torch.equal(logits(model), plain)  # it adds nothing yet
    names = {name.split(".")[-2] for name in adapter_modules(model) for _ in [0]}
    assert names == {"self_attn", "mlp"}  # lm_head has none
    train(model)
    assert not torch.equal(logits(model), plain)
    after = {n.replace(".base_layer", ""): p for n, p in model.named_parameters()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert type(model).__name__ == "LlamaForCausalLM"


def test_a_reference_shares_the_base_bit_for_bit(tiny: Callable[..., LanguageModel]) -> None:
    model = tiny(1).model
    plain = logits(model)
    lora().add_to(model)
    reference = frozen_copy(model)
    assert not adapter_modules(reference)
    own = {id(p) for p in model.parameters()}
    assert all(id(p) in own for p in reference.parameters())
    assert not any(p.requires_grad for p in reference.parameters())
    train(model)
    assert torch.equal(logits(reference), plain)
    assert any(p.requires_grad for p in model.parameters())


def test_a_reference_of_a_trained_adapter_stays_behind(base: Path, tmp_path: Path) -> None:
    trained_adapter(base, tmp_path / "warm")
    policy = source_at(Pretrained("unused"), str(tmp_path / "warm")).load().model
    lora().add_to(policy)  # goes on with the adapter that was loaded
    before = logits(policy)
    reference = frozen_copy(policy)
    shared = {id(p) for p in policy.parameters()} & {id(p) for p in reference.parameters()}
    assert len(shared) == sum(not p.requires_grad for p in policy.parameters())
    train(policy)
    assert torch.equal(logits(reference), before)
    assert not torch.equal(logits(policy), before)


def test_a_reference_that_moves_has_an_adapter_of_its_own(
    tiny: Callable[..., LanguageModel],
) -> None:
    model = tiny(1).model
    lora().add_to(model)
    reference = frozen_copy(model, moves=True)
    assert len(list(adapter_parameters(reference))) == len(list(adapter_parameters(model)))


def test_without_an_adapter_a_reference_shares_nothing(tiny: Callable[..., LanguageModel]) -> None:
    model = tiny(1, tie_embeddings=True).model
    NoAdapter().add_to(model)
    reference = frozen_copy(model)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in reference.parameters()}
    assert fingerprint(reference) == fingerprint(model)
    head: nn.Module = reference.get_output_embeddings()
    assert head.weight is reference.get_input_embeddings().weight


def test_models_loaded_one_by_one_share_what_is_equal(base: Path, tmp_path: Path) -> None:
    trained_adapter(base, tmp_path / "warm")
    policy = source_at(Pretrained("unused"), str(tmp_path / "warm")).load().model
    lora().add_to(policy)
    student = freeze(Pretrained(str(base)).load().model)
    before, size = logits(student), sum(p.numel() * 4 for p in student.parameters())
    with torch.no_grad():
        student.get_submodule("model.norm").weight.add_(1.0)
    changed = logits(student)
    norm_bytes = student.get_submodule("model.norm").weight.numel() * 4
    assert share_equal_weights(student, policy) == size - norm_bytes
    assert torch.equal(logits(student), changed) and not torch.equal(changed, before)
    assert share_equal_weights(student, policy) == 0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # by peft
def test_a_saved_adapter_is_loaded_again(base: Path, tmp_path: Path) -> None:
    model = trained_adapter(base, tmp_path / "adapter")
    wanted = logits(model)
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    source = source_at(Pretrained("unused"), str(tmp_path / "adapter"))
    assert isinstance(source, Adapted) and source.configuration().vocab_size > 0
    loaded = source.load()
    assert torch.equal(logits(loaded.model), wanted)
    assert not any(p.requires_grad for p in loaded.model.parameters())
    by_peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
    )
    assert torch.equal(logits(by_peft), wanted)
    by_auto = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(by_auto), wanted)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_merged_copy_says_the_same(base: Path, tmp_path: Path, rslora: bool) -> None:
    model = trained_adapter(base, tmp_path / "adapter", rslora=rslora)
    merged = merged_copy(model)
    assert not adapter_modules(merged) and adapter_modules(model)
    wanted = logits(model).log_softmax(-1)
    torch.testing.assert_close(logits(merged).log_softmax(-1), wanted, atol=1e-5, rtol=0)
    save_model(merged, Pretrained(str(base)).tokenizer(), tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(plain).log_softmax(-1), wanted, atol=1e-5, rtol=0)


def test_training_all_weights_merges_a_loaded_adapter(base: Path, tmp_path: Path) -> None:
    wanted = logits(trained_adapter(base, tmp_path / "adapter"))
    model = source_at(Pretrained("unused"), str(tmp_path / "adapter")).load().model
    NoAdapter().add_to(model)
    assert not adapter_modules(model) and all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=0)


def test_an_adapter_of_another_shape_is_not_trained_on(base: Path, tmp_path: Path) -> None:
    trained_adapter(base, tmp_path / "adapter")
    model = source_at(Pretrained("unused"), str(tmp_path / "adapter")).load().model
    with pytest.raises(ValueError, match=r"adapter\.rank=8: the model was loaded with .* 4"):
        lora(rank=8).add_to(model)


def test_an_adapter_of_another_model_is_not_loaded(
    base: Path, tmp_path: Path, tiny: Callable[..., LanguageModel]
) -> None:
    trained_adapter(base, tmp_path / "adapter")
    other = tiny(0, hidden_size=32)
    save_model(other.model, other.tokenizer, base)
    with pytest.raises(ValueError, match="does not fit its base model"):
        source_at(Pretrained("unused"), str(tmp_path / "adapter")).load()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "adapter.rank=0: must be a whole number of at least 1"),
        ({"dropout": 1.0}, "adapter.dropout=1.0: must be at least 0 and below 1"),
        ({"lr_factor": 0}, "adapter.lr_factor=0: must be above 0"),
        ({"dtype": "int8"}, "adapter.dtype=int8: choose float32, bfloat16"),
        ({"targets": "q_proj"}, "adapter.targets=q_proj: give all-linear, or a list"),
        ({"targets": ["q_proj", "lm_head"]}, "adapter.targets: lm_head takes no adapter"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        lora(**changes)
    assert message in str(error.value)


def test_no_module_has_that_name(tiny: Callable[..., LanguageModel]) -> None:
    with pytest.raises(ValueError, match=r"adapter\.targets=\['q_prj'\]"):
        lora(targets=["q_prj"]).add_to(tiny(0).model)


def test_the_type_of_the_trained_weights(tiny: Callable[..., LanguageModel]) -> None:
    model = tiny(0).model.to(torch.bfloat16)
    lora(dtype=None).add_to(model)
    assert {p.dtype for p in adapter_parameters(model)} == {torch.bfloat16}
