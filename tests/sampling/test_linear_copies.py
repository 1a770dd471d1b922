"""Sampling from copies of the linear layers: what is computed, and that the layers come back."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlt.llm.models import LanguageModel
from rlt.sampling import HFRollout, known_log_probs
from rlt.sampling.linear_copies import LinearCopy, linear_copies
from tests.llm.test_adapters import lora, train
from tests.llm.test_nf4 import qlora_model

IDS = torch.tensor([[5, 9, 40, 11, 3, 77, 8]])


def log_probs(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(IDS).logits
    return logits.float().log_softmax(-1)


def with_lora(made: LanguageModel) -> LanguageModel:
    lora().add_to(made.model)
    train(made.model)
    return made


@pytest.mark.parametrize("adapted", [False, True])
def test_copies_in_float32_compute_the_same(
    tiny: Callable[..., LanguageModel], adapted: bool
) -> None:
    model = (with_lora(tiny(1)) if adapted else tiny(1)).model
    before = log_probs(model)
    with linear_copies(model, torch.float32):
        assert sum(isinstance(m, LinearCopy) for m in model.modules()) >= 8
        assert isinstance(model.get_output_embeddings(), LinearCopy)
        assert torch.allclose(log_probs(model), before, atol=1e-5)
    assert torch.equal(log_probs(model), before)


def test_copies_of_nf4_layers(tiny: Callable[..., LanguageModel]) -> None:
    model = qlora_model(tiny(1)).model
    before = log_probs(model)
    with linear_copies(model, torch.float32):
        assert torch.allclose(log_probs(model), before, atol=1e-4)
    assert torch.equal(log_probs(model), before)


def test_copies_in_bfloat16_are_close(tiny: Callable[..., LanguageModel]) -> None:
    model = with_lora(tiny(1)).model
    before = log_probs(model)
    with linear_copies(model, torch.bfloat16):
        rounded = log_probs(model)
    kl = (before.exp() * (before - rounded)).sum(-1).mean()
    assert 0 < float(kl) < 1e-3


def test_layers_come_back_after_an_error(tiny: Callable[..., LanguageModel]) -> None:
    model = tiny(1).model
    layers = dict(model.named_modules())
    with pytest.raises(RuntimeError, match="stop"), linear_copies(model, torch.bfloat16):
        raise RuntimeError("stop")
    assert dict(model.named_modules()) == layers


def test_no_copies_leave_every_layer(tiny: Callable[..., LanguageModel]) -> None:
    model = tiny(1).model
    layers = dict(model.named_modules())
    with linear_copies(model, None):
        assert dict(model.named_modules()) == layers


@pytest.mark.parametrize(("dtype", "exact"), [("float32", True), ("bfloat16", False)])
def test_rollout_tells_whether_its_log_probs_are_the_models(
    tiny: Callable[..., LanguageModel], dtype: str, exact: bool
) -> None:
    made = with_lora(tiny(1))
    rollout = HFRollout(0.7, 6, linear_dtype=dtype)
    (group,) = rollout.sample(made.model, made.tokenizer, [[3, 5, 8]], 4, "</think>")
    assert all(completion.exact is exact for completion in group)
    assert (known_log_probs(made.model, group) is not None) is exact


def test_auto_copies_float32_models_on_a_cpu() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    rollout = HFRollout()
    assert rollout.dtype_of_copies(cpu, torch.float32) == torch.float32
    assert rollout.dtype_of_copies(cpu, torch.bfloat16) is None
    assert rollout.dtype_of_copies(gpu, torch.float32) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert rollout.dtype_of_copies(cpu, torch.float32) is None
    assert HFRollout(linear_dtype=None).dtype_of_copies(cpu, torch.float32) is None
    bfloat16 = HFRollout(linear_dtype="bfloat16")
    assert bfloat16.dtype_of_copies(gpu, torch.float32) == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_packed_copy_is_the_layer(dtype: torch.dtype, has_bias: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 40, bias=has_bias)
    copy = LinearCopy(layer.weight, layer.bias, dtype)
    if not copy.is_packed:
        pytest.skip("this CPU has no such linear layer")
    x = torch.randn(3, 5, 24)
    assert copy(x).dtype == torch.float32
    assert copy(x).shape == (3, 5, 40)
    assert torch.allclose(copy(x), layer(x), atol=1e-5 if dtype == torch.float32 else 0.03)


def test_unknown_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rollout.linear_dtype=int8 must be null or one of"):
        HFRollout(linear_dtype="int8")
