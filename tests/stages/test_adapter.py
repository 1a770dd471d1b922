"""`adapter=lora` from the command line: every stage that trains, its checkpoints, its exports."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlt.llm.model_sources import Pretrained, source_at
from rlt.llm.models import LanguageModel
from rlt.runs.identity import flatten
from rlt.training.policy import PolicyModule
from tests.cli import here, pipeline_from, read, stage, weights
from tests.llm.test_adapters import lora
from tests.stages.killing import At, finish, killed
from tests.stages.same import assert_same_training

SYNC = "rlt.training.checkpoints:_sync"
RL = [
    *stage("teacher_rl", "teacher_path=warm_lora/model"), "adapter=lora", "adapter.rank=4",
    "adapter.alpha=8",
]  # fmt: skip
WARM = [
    *stage("teacher_sft", "teacher_path=teacher_sft/model"), "adapter=lora", "adapter.rank=4",
    "adapter.alpha=8", "output_dir=warm_lora",
]  # fmt: skip


def policy_module(model: Any) -> PolicyModule:
    """A module that is never stepped."""
    made: Any = PolicyModule(model, None, None, None, 1, None, 64)  # type: ignore[arg-type]
    return made  # type: ignore[no-any-return]


@pytest.fixture
def warm(chain: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The chain's folder, with a teacher warmed up by an adapter."""
    here(WARM, chain, monkeypatch)
    return chain


def test_rl_goes_on_with_the_adapter_and_exports_it_merged(
    warm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = weights(warm / "teacher_sft")
    here([*RL, "adapter.merge=true", "output_dir=rl_lora"], warm, monkeypatch)
    run = warm / "rl_lora"
    models = read(run / "manifest.json")["models"]
    assert models["trained_parameters"] < models["parameters"] / 3
    held = models["bytes_in_memory"]
    assert held["reference and student"] == 4 * models["trained_parameters"]  # its own adapter
    assert weights(warm / "teacher_sft") == before
    warmed = load_file(warm / "warm_lora" / "model" / "adapter_model.safetensors")
    trained = load_file(run / "model" / "adapter_model.safetensors")
    assert warmed.keys() == trained.keys()
    assert any(not torch.equal(warmed[name], trained[name]) for name in warmed)
    base = str(warm / "teacher_sft" / "model")
    assert read(run / "model" / "adapter_config.json")["base_model_name_or_path"] == base
    card = (run / "model" / "README.md").read_text()
    assert "library_name: peft" in card and f"its base model is `{base}`" in card
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        adapted = AutoModelForCausalLM.from_pretrained(run / "model")(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(run / "merged")(ids).logits
    torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=0)
    here(
        [*stage("collect", "teacher_path=rl_lora/model"), "output_dir=lora_traces"],
        warm, monkeypatch,
    )  # fmt: skip
    assert (warm / "lora_traces" / "traces.jsonl").is_file()


def test_an_adapters_run_that_is_killed_ends_the_same(warm: Path) -> None:
    finish([*RL, "output_dir=rl_lora_whole"], warm)
    command = [*RL, "output_dir=rl_lora_killed"]
    killed(command, warm, At(SYNC, 6))
    assert "resuming from step=" in finish(command, warm)
    assert_same_training(warm / "rl_lora_killed", warm / "rl_lora_whole")
    (checkpoint,) = list((warm / "rl_lora_whole" / "checkpoints").glob("*.ckpt"))[-1:]
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert state and all("lora_" in name for name in state)


def test_qlora_trains_is_killed_goes_on_and_is_sampled_from(
    chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher's base is in NF4, which reference, reward student and later stages share."""
    command = [
        *stage("teacher_rl", "teacher_path=teacher_sft/model"), "adapter=qlora", "adapter.rank=4",
        "adapter.alpha=8", "adapter.merge=true",
    ]  # fmt: skip
    here([*command, "output_dir=rl_qlora"], chain, monkeypatch)
    run = chain / "rl_qlora"
    assert read(run / "model" / "nf4.json") == {"double": True}
    models = read(run / "manifest.json")["models"]
    assert models["bytes_in_memory"]["teacher"] < 0.6 * 4 * models["parameters"]
    killed([*command, "output_dir=rl_qlora_killed"], chain, At(SYNC, 6))
    assert "resuming from step=" in finish([*command, "output_dir=rl_qlora_killed"], chain)
    assert_same_training(chain / "rl_qlora_killed", run)
    ids = torch.tensor([[3, 4, 5, 6]])
    base = Pretrained(str(chain / "teacher_sft" / "model"))
    with torch.no_grad():
        adapted = source_at(base, str(run / "model")).load().model(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(run / "merged")(ids).logits
    torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=0)
    here(
        [*stage("collect", "teacher_path=rl_qlora/model"), "output_dir=qlora_traces"],
        chain, monkeypatch,
    )  # fmt: skip
    assert (chain / "qlora_traces" / "traces.jsonl").is_file()


def test_states_in_8_bits_go_on_bit_for_bit(chain: Path) -> None:
    command = stage("teacher_rl", "teacher_path=teacher_sft/model", "optim=adamw8bit")
    finish([*command, "output_dir=rl_8bit_whole"], chain)
    killed([*command, "output_dir=rl_8bit_killed"], chain, At(SYNC, 6))
    assert "resuming from step=" in finish([*command, "output_dir=rl_8bit_killed"], chain)
    assert_same_training(chain / "rl_8bit_killed", chain / "rl_8bit_whole")
    (checkpoint,) = list((chain / "rl_8bit_whole" / "checkpoints").glob("*.ckpt"))[-1:]
    (optimizer,) = torch.load(checkpoint, weights_only=True)["optimizer_states"]
    dtypes = {getattr(value, "dtype", None) for value in flatten(optimizer["state"]).values()}
    assert torch.uint8 in dtypes


def test_a_checkpoint_of_another_adapter_is_not_taken(tiny: Callable[..., LanguageModel]) -> None:
    """Its weights would otherwise be left as they are, without a word."""
    modules = []
    for targets in (["q_proj", "v_proj"], ["q_proj"]):
        model = tiny(0).model
        lora(targets=targets).add_to(model)
        modules.append(policy_module(model))
    wide, narrow = modules
    state = wide.state_dict()
    assert all("lora_" in name for name in state)
    wide.load_state_dict(state)
    with pytest.raises(ValueError, match="the checkpoint's adapter has 8 weights, the config's"):
        narrow.load_state_dict(state)


def test_another_rank_does_not_go_on(
    warm: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    here([*RL, "adapter.rank=8", "output_dir=rl_lora_8"], warm, monkeypatch, status=2)
    assert "adapter.rank=8: the model was loaded with an adapter whose rank is 4" in (
        capfd.readouterr().err
    )


def test_a_pipeline_hands_its_adapters_on(base: Path, warm: Path) -> None:
    """Teacher and student are trained by adapters, and are evaluated with them."""
    finish(pipeline_from(base, "adapter=lora", "output_dir=piped_lora"), warm)
    for step in ("warm_up", "teacher", "student"):
        model = warm / "piped_lora" / "steps" / step / "model"
        assert (model / "adapter_model.safetensors").is_file()
    assert "accuracy/eval/avg@3" in read(warm / "piped_lora" / "metrics.json")
