"""How much memory a stage will need at its peak, phase by phase, before any weights are loaded.

With P parameters of b bytes each in every model that is in memory (models that share weights
count once, so with an adapter the reference, and a student of the same source, count nothing),
layers L, hidden size D, query and key widths H and K, feed-forward size F and vocabulary V, a phase
takes

    start      memory that this process already uses (on a GPU: none)
    weights    Σ b·P over the models
    training   b·P of gradients, and the optimizer's state: for AdamW 2 values a parameter; with an
               adapter of A parameters, 4·A of weights, gradients and state instead
    rollout    2·L·K·b of keys and values for each token in the cache (a shared prompt counts
               once), and about 28·V bytes a row to draw a token
    reward     2·(4·D + 2·H + 2·K + 3·F)·a a token of one micro-batch and 3 chunks of logits
    update     L·(6·D + 4·H + 2·K + 4·F)·a a token of one micro-batch, and 3 chunks of logits;
               with gradient checkpointing L·D·a and the activations of one layer instead

where an activation takes a bytes (4, or 2 in bfloat16) and a chunk of logits at most 2^25 float32
values. Training stages hold gradients and optimizer states in all their phases. A micro-batch has
`hardware.tokens_per_micro_batch` tokens, or those of its longest row if that is longer. Autocast
also keeps a copy of the weights in bfloat16.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rlt.llm.adapters import Adapter, adapter_parameters
from rlt.llm.device import Hardware
from rlt.llm.lm_head import MAX_LOGITS
from rlt.llm.model_sources import ModelSource
from rlt.llm.models import context_of
from rlt.stages.stage import ModelStage
from rlt.stages.training import TrainingStage


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, and the bytes of each parameter once it is loaded."""

    parameters: int
    bytes_each: int
    layers: int
    hidden: int
    queries: int
    keys: int
    intermediate: int
    vocabulary: int
    context: int
    adapter: int = 0  # parameters of the adapter that is trained beside them; 0: all are trained

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return self.parameters * self.bytes_each


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens in the prompts and targets of a sample of the data."""

    prompts: list[int]
    targets: list[int]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt plus tokens of the longest target."""
        return max(self.prompts, default=0) + max(self.targets, default=0)

    def __str__(self) -> str:
        parts = {"prompt": self.prompts, "target": self.targets}
        shown = [
            f"{name} {median(values):.0f} tokens (longest {max(values)})"
            for name, values in parts.items()
            if values
        ]
        return ", ".join(shown)


def lengths_of(rows: Iterable[tuple[Sequence[int], Sequence[int]]]) -> Lengths:
    """Return the lengths of (prompt, target) pairs of token ids; empty targets do not count."""
    sample = [(len(prompt), len(target)) for prompt, target in rows]
    return Lengths([p for p, _ in sample], [t for _, t in sample if t])


def shape_of(source: ModelSource, adapter: Adapter | None = None) -> Shape:
    """Return the sizes of a model, which is built without weights on torch's meta device.

    Args:
        source: where the model comes from.
        adapter: what is trained of it, if it is trained.

    Raises:
        OSError: the config is on a hub that cannot be reached.
    """
    config = source.configuration()
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
        parameters = sum(p.numel() for p in model.parameters())
        if adapter is not None:
            adapter.add_to(model)
    text = config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    dtype: Any = getattr(source, "dtype", "auto")
    dtype = (text.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    return Shape(
        parameters=parameters,
        bytes_each=dtype.itemsize,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        queries=text.num_attention_heads * width,
        keys=(getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * width,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        context=context_of(config),
        adapter=sum(p.numel() for p in adapter_parameters(model)),
    )


def peak_bytes(
    stage: ModelStage, shapes: Mapping[str, Shape], longest: int, prompt: int
) -> dict[str, int]:
    """Return phase → peak memory in bytes, by the formulas above.

    Args:
        shapes: role → shape, for those of `teacher` and `student` that the stage loads.
        longest: tokens of the longest row, including all that may follow the prompt.
        prompt: tokens of the longest prompt.
    """
    hardware = stage.hardware
    activation = 2 if "bf16" in hardware.precision else 4
    start = held_bytes() if hardware.device.type == "cpu" else 0
    partly = stage.trains is not None and shapes[stage.trains].adapter > 0
    start += sum(
        shape.weights
        for role, shape in shapes.items()
        if not (partly and role != stage.trains and same_source(stage, role))
    )
    if stage.holds_reference and not partly:
        assert stage.trains is not None
        start += shapes[stage.trains].weights
    micro = max(hardware.tokens_per_micro_batch, longest)
    phases = {}
    if isinstance(stage, TrainingStage):
        assert stage.trains is not None
        policy = shapes[stage.trains]
        trained = 4 * policy.adapter if partly else policy.weights
        start += trained + round(trained * optimizer_values(stage.optim))
        start += trained if partly else 0  # an adapter's weights come on top of the model's
        start += 2 * policy.parameters if "bf16-mixed" in hardware.precision else 0
        tokens = min(micro, stage.rows_per_step * longest)
        layer = 6 * policy.hidden + 4 * policy.queries + 2 * policy.keys + 4 * policy.intermediate
        per_token = policy.layers * layer
        if hardware.gradient_checkpointing:
            per_token = policy.layers * policy.hidden + layer
        logits = 3 * _logits(policy, tokens)
        phases["update"] = start + tokens * per_token * activation + logits
    if stage.scores_by is not None:
        phases["reward"] = start + _forward(shapes[stage.scores_by], micro, activation)
    rollout: Any = getattr(stage, "rollout", None)
    if rollout is not None and stage.completions is not None:
        assert stage.writer is not None
        writer = shapes[stage.writer]
        rows, shared = stage.completions
        rows = min(rows, max(1, rollout.token_budget.tokens // (prompt + rollout.max_new_tokens)))
        places = rows * rollout.max_new_tokens + math.ceil(rows / shared) * prompt
        cache = 2 * writer.layers * writer.keys * writer.bytes_each * places
        first = _forward(writer, math.ceil(rows / shared) * prompt, activation)
        phases["rollout"] = start + max(cache, first) + 28 * rows * writer.vocabulary
    return phases


def same_source(stage: ModelStage, role: str) -> bool:
    """Whether a role's base model is that of the trained role, whose weights it then shares."""
    assert stage.trains is not None
    own, trained = stage.source(role), stage.source(stage.trains)
    # As text: the tokenizer of a model from scratch is a function, bound anew for each role.
    return str(getattr(own, "base", own)) == str(getattr(trained, "base", trained))


def memory_in_words(
    stage: ModelStage, shapes: Mapping[str, Shape], lengths: Lengths
) -> tuple[str, list[str]]:
    """Return the estimated peaks as text, and warnings if the machine has less memory."""
    rollout: Any = getattr(stage, "rollout", None)
    new_tokens = rollout.max_new_tokens if rollout is not None else 0
    prompt = max(lengths.prompts, default=0)
    phases = peak_bytes(stage, shapes, lengths.longest + new_tokens, prompt)
    phase = max(phases, key=lambda name: phases[name])
    words = "memory (estimated): " + ", ".join(f"{k} {gigabytes(v)}" for k, v in phases.items())
    there = machine_bytes(stage.hardware)
    if there is None:
        return f"{words}; no such device here", []
    if phases[phase] <= there:
        return f"{words}, of {gigabytes(there)}", []
    return f"{words}, of {gigabytes(there)}", [
        f"the {phase} needs about {gigabytes(phases[phase])} and this machine has "
        f"{gigabytes(there)}: lower hardware.tokens_per_micro_batch or "
        "hardware.generation_token_budget, set hardware.gradient_checkpointing=true, or choose a "
        "smaller model"
    ]


def _forward(shape: Shape, tokens: int, activation: int) -> int:
    """Return the bytes of a forward pass without gradients, which holds two layers at once."""
    layer = 4 * shape.hidden + 2 * shape.queries + 2 * shape.keys + 3 * shape.intermediate
    return 2 * layer * tokens * activation + 3 * _logits(shape, tokens)


def _logits(shape: Shape, tokens: int) -> int:
    return 4 * min(MAX_LOGITS, tokens * shape.vocabulary)


def optimizer_values(optim: Callable[..., torch.optim.Optimizer]) -> float:
    """Return how many values an optimizer keeps per parameter, measured on a small matrix."""
    weight = torch.nn.Parameter(torch.zeros(256, 256))
    weight.grad = torch.zeros_like(weight)
    optimizer = optim([weight])
    optimizer.step()
    kept = optimizer.state[weight].values()
    return sum(v.numel() for v in kept if isinstance(v, torch.Tensor)) / weight.numel()


def held_bytes() -> int:
    """Return the resident memory of this process in bytes; 0 if the system does not report it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def machine_bytes(hardware: Hardware) -> int | None:
    """Return the memory of the configured device in bytes; None if there is no such device."""
    device = hardware.device
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return None
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def gigabytes(size: float) -> str:
    """Return a number of bytes as text, in units of 10^9 bytes."""
    return f"{size / 1e9:.1f} GB"
