"""Which models fit on which card, by the memory estimate: the table of docs/hardware.md.

    python -m benchmarks.what_fits                    # Markdown
    python -m benchmarks.what_fits --prompt 400 --new-tokens 512

Nothing is loaded. For each hardware profile and each way to train, the table names the largest
model of the families in `conf/model/` whose estimated peak leaves a tenth of the card free.
The sizes of the models are those of their published configs, so no hub is asked.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra import compose, initialize_config_dir
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from rlt.config.build import build_stage
from rlt.config.compose import config_dir
from rlt.preflight.memory_advice import gigabytes, machine_bytes
from rlt.preflight.memory_estimate import peak_bytes, shape_of

PROFILES = ("gpu_8gb", "gpu_12gb", "gpu_16gb", "gpu_24gb", "gpu_48gb", "gpu_80gb")
WAYS = ("none", "lora", "qlora")
JOBS = {"teacher_rl": "teacher RL", "distill": "SFT"}
# hidden, layers, heads, key heads, intermediate, vocabulary, tied embeddings
SIZES: dict[str, tuple[Any, tuple[int, int, int, int, int, int], bool]] = {
    "SmolLM2-135M": (LlamaConfig, (576, 30, 9, 3, 1536, 49152), True),
    "SmolLM2-360M": (LlamaConfig, (960, 32, 15, 5, 2560, 49152), True),
    "Qwen2.5-0.5B": (Qwen2Config, (896, 24, 14, 2, 4864, 151936), True),
    "Qwen2.5-1.5B": (Qwen2Config, (1536, 28, 12, 2, 8960, 151936), True),
    "Qwen2.5-3B": (Qwen2Config, (2048, 36, 16, 2, 11008, 151936), True),
    "Qwen2.5-7B": (Qwen2Config, (3584, 28, 28, 4, 18944, 152064), False),
    "Qwen2.5-32B": (Qwen2Config, (5120, 64, 40, 8, 27648, 152064), False),
}


@dataclass(frozen=True)
class Sized:
    """A source that knows the sizes of a model, and has no weights."""

    name: str
    dtype: str

    def configuration(self) -> PreTrainedConfig:
        """Transformers' config of a model of this size."""
        kind, (hidden, layers, heads, key_heads, intermediate, vocabulary), tied = SIZES[self.name]
        config: PreTrainedConfig = kind(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=key_heads, intermediate_size=intermediate,
            vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=32768,
        )  # fmt: skip
        return config


def stage_on(name: str, profile: str, *overrides: str) -> Any:
    """A stage that is built for a card."""
    of_distill = ["explanations=data"] if name == "distill" else []
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return build_stage(
            compose("config", [f"stage={name}", f"hardware={profile}", *of_distill, *overrides])
        )


def peak(stage_name: str, profile: str, way: str, model: str, prompt: int, new: int) -> int:
    """Bytes of the stage's largest phase, with micro-batches of one row and eight rows sampled.

    In teacher RL the reward's student is the model that the teacher started from. A frozen base is
    held in bfloat16 with an adapter, and in float32 without one.
    """
    overrides = [
        f"adapter={way}", f"hardware.tokens_per_micro_batch={prompt + new}",
        f"hardware.generation_token_budget={8 * (prompt + new)}",
    ]  # fmt: skip
    overrides += [f"rollout.max_new_tokens={new}"] if stage_name == "teacher_rl" else []
    stage = stage_on(stage_name, profile, *overrides)
    source: Any = Sized(model, "float32" if way == "none" else "bfloat16")
    setattr(stage, stage.trains, source)
    shapes = {role: shape_of(source, stage.adapting, role == stage.trains) for role in stage.roles}
    return max(peak_bytes(stage, shapes, prompt + new, prompt).values())


def largest(stage_name: str, profile: str, way: str, prompt: int, new: int) -> str:
    """The largest model that fits, and its peak; a dash if none fits."""
    available = machine_bytes(stage_on(stage_name, profile).hardware)
    assert available is not None
    for model in reversed(SIZES):
        needed = peak(stage_name, profile, way, model, prompt, new)
        if needed <= 0.9 * available:
            return f"{model} ({gigabytes(needed)})"
    return "–"


def main(argv: Sequence[str] | None = None) -> str:
    """Print the table and return it."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--prompt", type=int, default=400, help="tokens of the longest prompt")
    made.add_argument("--new-tokens", type=int, default=512, help="tokens of a completion")
    options = made.parse_args(argv)
    lines = []
    for job, title in JOBS.items():
        lines += [
            f"| {title} | " + " | ".join(f"`adapter={way}`" for way in WAYS) + " |",
            "| --- " * (1 + len(WAYS)) + "|",
        ]
        for profile in PROFILES:
            cells = [largest(job, profile, way, options.prompt, options.new_tokens) for way in WAYS]
            lines.append(f"| `{profile}` | " + " | ".join(cells) + " |")
        lines.append("")
    text = "\n".join(lines)
    print(text)
    return text


if __name__ == "__main__":
    main()
