"""The experiments for GPUs, end to end on a tiny model of the same class, on a CPU."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlt.llm.models import LanguageModel, save_model
from tests.cli import here, read

# What a CPU in a test has instead of the GPU, the hub and the time.
SMALL = [
    "debug=pipeline", "hardware=cpu", "hardware.dtype=bfloat16", "hardware.threads=1",
    "data.source.path=gsm8k", "data.source.name=null", "benchmark.data.source.path=gsm8k_test",
    "benchmark.data.source.name=null", "benchmark.data.source.split=train", "prompt=compact",
    "data.validation_fraction=0.2", "data.max_tokens=null", "benchmark.max_questions=2",
    "output_dir=run",
]  # fmt: skip


@pytest.fixture
def gpu_less(tmp_path: Path, tiny: Callable[..., LanguageModel]) -> Path:
    """A folder with a tiny Qwen2, and with problems written as GSM8K's are."""
    config = Qwen2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, vocab_size=len(tiny().tokenizer), max_position_embeddings=1024,
        tie_word_embeddings=True,
    )  # fmt: skip
    save_model(Qwen2ForCausalLM(config), tiny().tokenizer, tmp_path / "qwen")
    for folder, first in (("gsm8k", 0), ("gsm8k_test", 1000)):
        (tmp_path / folder).mkdir()
        rows = [
            {"question": f"Ann has {n} pens, and buys 2. How many?",
             "answer": f"{n} + 2 = {n + 2}\n#### {n + 2}"}
            for n in range(first, first + 24)
        ]  # fmt: skip
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / folder / "train.jsonl").write_text(lines)
    return tmp_path


@pytest.mark.parametrize(
    ("experiment", "in_nf4"),
    [
        ("rlt_1_5b", False), ("rlt_7b_qlora", True),
        ("claim/qwen_0_5b", False), ("claim/qwen_1_5b", False),
    ],
)  # fmt: skip
def test_it_runs_on_a_tiny_model_of_its_class(
    experiment: str, in_nf4: bool, gpu_less: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [f"{role}.path={gpu_less}/qwen" for role in ("teacher", "student")]
    here([f"experiment={experiment}", *models, *SMALL], gpu_less, monkeypatch)
    steps = {row["name"]: Path(row["dir"]) for row in read(gpu_less / "run" / "steps.json")}
    for name in ("warm_up", "teacher", "student"):
        assert (gpu_less / steps[name] / "model" / "adapter_config.json").is_file()
        assert (gpu_less / steps[name] / "model" / "nf4.json").is_file() == in_nf4
    held = read(gpu_less / steps["teacher"] / "manifest.json")["models"]["bytes_in_memory"]
    assert held["student"] < held["teacher"] / 3  # an adapter of its own, at the most
    assert 0 <= read(gpu_less / steps["accuracy"] / "metrics.json")["eval/avg@2"] <= 1
