"""How much memory a stage will need at its peak, phase by phase, before any weights are loaded.

With P parameters of b bytes each in every model that is in memory (models that share weights
count once, so with an adapter the reference, and a student of the same source, count nothing;
linear layers in NF4 take about half a byte a parameter instead),
layers L, hidden size D, query and key widths H and K, feed-forward size F and vocabulary V, a phase
takes

    start      memory that this process already uses (on a GPU: 0.5 GB of CUDA's own)
    weights    Σ b·P over the models
    training   b·P of gradients, and the optimizer's state: for AdamW 2 values a parameter, of 4
               bytes or of 1; with an
               adapter of A parameters, 4·A of weights, gradients and state instead
    rollout    2·L·K·b of keys and values for each token in the cache (a shared prompt counts
               once), and about 28·V bytes a row to draw a token
               (with `rollout.linear_dtype`, also copies of all linear layers in that type)
    reward     2·(4·D + 2·H + 2·K + 3·F)·a a token of one micro-batch and 3 chunks of logits
    update     L·(6·D + 4·H + 2·K + 4·F)·a a token of one micro-batch, 2·L·K·a for each row and
               token of its prompt where rows share the prompt, and 3 chunks of the targets' logits;
               with gradient checkpointing L·D·a and the activations of one layer instead

where an activation takes a bytes (4; 2 in bfloat16; 3 under bf16 autocast, which keeps norms and
residuals in float32) and a chunk of logits at most 2^25 float32 values. Training stages hold
gradients and optimizer states in all their phases. A micro-batch has
`hardware.tokens_per_micro_batch` tokens, or those of its longest row if that is longer, and at most
those of the whole step, in whole rows; a prompt that rows share counts once. Under autocast, every
forward pass of the update also keeps a copy of float32 linear layers in bfloat16 for its backward
pass (two passes where prompts are shared, one layer's copy with gradient checkpointing). The
rollout keeps one if all weights are trained: autocast keeps no copy of a frozen weight. Only stages
that train run under autocast.

With sharded weights (`hardware.strategy=fsdp`), a rank holds its part of the policy's weights,
gradients and optimizer state. Gathered weights come on top: all of them in rollout and reward, and
in the update those of embeddings, head and two layers with their gradients. They are in bfloat16
under autocast, and no other copy is then made. These terms have not been measured.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rlt.llm import nf4
from rlt.llm.adapter_layers import adapter_parameters
from rlt.llm.adapters import Adapter, NoAdapter
from rlt.llm.lm_head import MAX_LOGITS
from rlt.llm.logprobs import shares_prefixes
from rlt.llm.model_sources import Adapted, ModelSource
from rlt.llm.models import context_of
from rlt.sampling import HFRollout
from rlt.stages.stage import ModelStage
from rlt.stages.training import TrainingStage

CUDA_BYTES = 500_000_000  # of context and kernels, before the first tensor


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
    shares_prompts: bool = False  # rows of one prompt run it once
    linear: int = 0  # how many of the parameters are weights of linear layers, the head included
    in_nf4: int = 0  # how many of the parameters are held in NF4
    bytes_in_nf4: float = 0.0  # of each of these

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        plain = (self.parameters - self.in_nf4) * self.bytes_each
        return plain + round(self.in_nf4 * self.bytes_in_nf4)

    @property
    def cast_bytes(self) -> int:
        """Bytes of the linear layers' copies in bfloat16 that autocast makes in a forward pass.

        Layers in NF4 are decoded anew for each product.
        """
        return 2 * (self.linear - self.in_nf4) if self.bytes_each == 4 else 0


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


def longest_row(stage: ModelStage, lengths: Lengths) -> tuple[int, int]:
    """Return the tokens of the longest row, with all that may follow its prompt, and of the prompt.

    Args:
        lengths: of a sample of the stage's rows.
    """
    rollout: Any = getattr(stage, "rollout", None)
    new_tokens = rollout.max_new_tokens if rollout is not None else 0
    return lengths.longest + new_tokens, max(lengths.prompts, default=0)


def shape_of(source: ModelSource, adapter: Adapter | None = None, trained: bool = True) -> Shape:
    """Return the sizes of a model, which is built without weights on torch's meta device.

    Args:
        source: where the model comes from.
        adapter: the adapter of the stage that loads it; None for a stage without one.
        trained: whether the stage trains this model, so that it gets an adapter of its own.

    Raises:
        OSError: the config is on a hub that cannot be reached.
    """
    config = source.configuration()
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
        parameters = sum(p.numel() for p in model.parameters())
        linear = sum(layer.weight.numel() for _, layer in nf4.linear_layers(model))
        if adapter is not None and trained:
            adapter.add_to(model)
    text = config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    dtype: Any = getattr(source, "dtype", "auto")
    dtype = (text.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    double = nf4.read_nf4_file(Path(source.path)) if isinstance(source, Adapted) else None
    if isinstance(adapter, NoAdapter) and trained:
        double = None  # an adapter that was trained on codes is merged into plain weights
    elif adapter is not None and adapter.quantization is not None:
        double = adapter.double_quantization if double is None else double
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
        shares_prompts=shares_prefixes(model),
        linear=linear + model.get_output_embeddings().weight.numel(),
        in_nf4=linear if double is not None else 0,
        bytes_in_nf4=nf4.BYTES_EACH if double else nf4.BYTES_EACH_SINGLE,
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
    start = held_bytes() if hardware.device.type == "cpu" else CUDA_BYTES
    partly = stage.trains is not None and shapes[stage.trains].adapter > 0
    shards, gathered_in_part, gathered_whole = hardware.shards, 0, 0
    sharing = [
        role
        for role in shapes
        if stage.trains is not None and role != stage.trains and same_source(stage, role)
    ]
    start += sum(
        shape.weights
        for role, shape in shapes.items()
        if role != stage.trains and not (partly and role in sharing)
    )
    if stage.trains is not None:
        policy = shapes[stage.trains]
        start += policy.weights // shards
        # Shards are no whole weights: a frozen model that would share them holds its own.
        apart = partly and shards > 1 and (stage.holds_reference or bool(sharing))
        if apart or (stage.holds_reference and not partly):
            start += policy.weights
        if shards > 1:
            gathered_in_part, gathered_whole = _gathered(policy, stage, partly)
    phases = {}
    if isinstance(stage, TrainingStage):
        assert stage.trains is not None
        policy = shapes[stage.trains]
        trained = (4 * policy.adapter if partly else policy.weights) // shards
        start += trained + round(trained * optimizer_bytes(stage.optim))
        start += trained if partly else 0  # an adapter's weights come on top of the model's
        phases["update"] = start + _update(stage, policy, longest, prompt) + gathered_in_part
    if stage.scores_by is not None:
        micro = max(hardware.micro_batch_tokens, longest)
        phases["reward"] = start + _forward(shapes[stage.scores_by], micro, stage) + gathered_whole
    if isinstance(getattr(stage, "rollout", None), HFRollout) and stage.completions is not None:
        assert stage.writer is not None  # other engines hold their caches elsewhere
        phases["rollout"] = start + _rollout(stage, shapes[stage.writer], prompt) + gathered_whole
    return phases


def _gathered(policy: Shape, stage: ModelStage, partly: bool) -> tuple[int, int]:
    """Return the bytes of sharded weights that are gathered in the update, and while sampling.

    The update gathers embeddings and head, and of the layers the one that computes and the next,
    with their gradients in float32.
    """
    bytes_each = 2 if _mixed(stage) else policy.bytes_each
    ends = 2 * policy.vocabulary * policy.hidden
    layer = max(0, policy.parameters - ends) // policy.layers
    in_part = (ends + 2 * layer) * (bytes_each + (0 if partly else 4))
    return in_part, policy.parameters * bytes_each


def _update(stage: TrainingStage, policy: Shape, longest: int, prompt: int) -> int:
    """Return the bytes of a forward and backward pass over the largest micro-batch."""
    hardware = stage.hardware
    tokens, targets, expanded = _micro_batch(stage, policy, longest, prompt)
    layer = 6 * policy.hidden + 4 * policy.queries + 2 * policy.keys + 4 * policy.intermediate
    values = tokens * policy.layers * layer + 2 * policy.layers * policy.keys * expanded
    cast = policy.cast_bytes * (2 if expanded else 1)
    if hardware.gradient_checkpointing:
        values = tokens * (policy.layers * policy.hidden + layer)
        cast = policy.cast_bytes // policy.layers
    if not _mixed(stage) or hardware.shards > 1:  # shards are gathered in bfloat16
        cast = 0
    return values * _activation_bytes(stage) + cast + 3 * _logits(policy, targets)


def _rollout(stage: ModelStage, writer: Shape, prompt: int) -> int:
    """Return the bytes of sampling: caches, copies of linear layers, what draws a token."""
    assert stage.completions is not None
    rollout: Any = stage.rollout  # type: ignore[attr-defined]
    rows, shared = stage.completions
    rows = min(rows, max(1, rollout.token_budget.tokens // (prompt + rollout.max_new_tokens)))
    prompts = math.ceil(rows / shared) * prompt
    cache = 2 * writer.layers * writer.keys * writer.bytes_each
    cache *= rows * rollout.max_new_tokens + prompts
    first = _forward(writer, prompts, stage)
    mixed = _mixed(stage)
    own = torch.float32 if writer.bytes_each == 4 and not mixed else torch.bfloat16
    copied = rollout.dtype_of_copies(stage.hardware.device, own)
    copies = writer.linear * copied.itemsize if copied is not None else 0
    if mixed and copied is None and writer.adapter == 0 and stage.hardware.shards == 1:
        copies = writer.cast_bytes
    return copies + max(cache, first) + 28 * rows * writer.vocabulary


def _micro_batch(
    stage: TrainingStage, policy: Shape, longest: int, prompt: int
) -> tuple[int, int, int]:
    """Return tokens of a micro-batch of the update: all, those with a loss, those copied to rows.

    The last number counts the prompt of each row where rows share prompts, as keys and values of
    the prompt are then copied to the row.
    """
    rows, micro = stage.rows_per_step, max(stage.hardware.micro_batch_tokens, longest)
    shares = policy.shares_prompts and not stage.hardware.gradient_checkpointing
    group = stage.completions[1] if stage.completions is not None and shares else 1
    target = longest - prompt
    of_group = prompt + group * target
    groups, left = divmod(micro, of_group)
    in_part = (left - prompt) // max(target, 1) if left >= longest else 0  # of one more group
    if groups * group + in_part >= rows:
        groups, in_part = rows // group, 0
    tokens = groups * of_group + (prompt + in_part * target if in_part else 0)
    in_batch = groups * group + in_part
    return tokens, in_batch * target, in_batch * prompt if group > 1 else 0


def same_source(stage: ModelStage, role: str) -> bool:
    """Whether a role's base model is that of the trained role, whose weights it then shares."""
    assert stage.trains is not None
    own, trained = stage.source(role), stage.source(stage.trains)
    # As text: the tokenizer of a model from scratch is a function, bound anew for each role.
    return str(getattr(own, "base", own)) == str(getattr(trained, "base", trained))


def _mixed(stage: ModelStage) -> bool:
    """Whether models run under autocast to bfloat16, as in Lightning's Trainer."""
    return "bf16-mixed" in stage.hardware.precision and isinstance(stage, TrainingStage)


def _activation_bytes(stage: ModelStage) -> int:
    """Return the bytes of an activation, a mean over those in float32 and bfloat16."""
    if _mixed(stage):
        return 3
    low = stage.hardware.dtype == "bfloat16" or "bf16-true" in stage.hardware.precision
    return 2 if low else 4


def _forward(shape: Shape, tokens: int, stage: ModelStage) -> int:
    """Return the bytes of a forward pass without gradients, which holds two layers at once."""
    layer = 4 * shape.hidden + 2 * shape.queries + 2 * shape.keys + 3 * shape.intermediate
    return 2 * layer * tokens * _activation_bytes(stage) + 3 * _logits(shape, tokens)


def _logits(shape: Shape, tokens: int) -> int:
    return 4 * min(MAX_LOGITS, tokens * shape.vocabulary)


def optimizer_bytes(optim: Callable[..., torch.optim.Optimizer]) -> float:
    """Return how many bytes an optimizer keeps for each byte of weights, seen on a small matrix."""
    weight = torch.nn.Parameter(torch.zeros(256, 256))
    weight.grad = torch.zeros_like(weight)
    optimizer = optim([weight])
    optimizer.step()
    kept = optimizer.state[weight].values()
    return sum(v.nbytes for v in kept if isinstance(v, torch.Tensor)) / weight.nbytes


def held_bytes() -> int:
    """Return the resident memory of this process in bytes; 0 if the system does not report it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
