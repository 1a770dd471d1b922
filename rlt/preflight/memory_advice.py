"""What the plan says of memory: estimated peaks, whether they fit, and what would make them fit."""

import copy
import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import OmegaConf

from rlt.config.build import build
from rlt.config.compose import config_dir
from rlt.llm.adapters import Adapter
from rlt.llm.device import Hardware
from rlt.llm.token_budget import TokenBudget
from rlt.preflight.memory_estimate import Lengths, Shape, peak_bytes, shape_of
from rlt.stages.stage import ModelStage


def memory_in_words(
    stage: ModelStage, shapes: Mapping[str, Shape], lengths: Lengths
) -> tuple[str, list[str]]:
    """Return the estimated peaks as text, and a warning if they are more than the memory."""
    rollout: Any = getattr(stage, "rollout", None)
    new_tokens = rollout.max_new_tokens if rollout is not None else 0
    longest, prompt = lengths.longest + new_tokens, max(lengths.prompts, default=0)
    phases = peak_bytes(stage, shapes, longest, prompt)
    phase = max(phases, key=lambda name: phases[name])
    words = "memory (estimated): " + ", ".join(f"{k} {gigabytes(v)}" for k, v in phases.items())
    available = machine_bytes(stage.hardware)
    if available is None:
        return f"{words}; no such device here, and hardware.memory_gb is null", []
    if phases[phase] <= available:
        return f"{words}, of {gigabytes(available)}", []
    change = change_that_fits(stage, shapes, longest, prompt, available)
    return f"{words}, of {gigabytes(available)}", [
        f"the {phase} needs about {gigabytes(phases[phase])} and this machine has "
        f"{gigabytes(available)}: "
        + (f"{change} would make it fit" if change else "choose a smaller model")
    ]


def change_that_fits(
    stage: ModelStage, shapes: Mapping[str, Shape], longest: int, prompt: int, available: int
) -> str | None:
    """The first change of the config, from the cheapest on, after which a stage fits.

    Args:
        shapes, longest, prompt: see `peak_bytes`.
        available: bytes of the device.

    Returns:
        The change as overrides of the command line; None if none of them is enough.
    """
    micro = f"hardware.tokens_per_micro_batch={longest}"
    few = f"hardware.generation_token_budget={8 * longest}"
    checkpointing = "hardware.gradient_checkpointing=true"
    thrifty: list[tuple[list[str], dict[str, Any]]] = [
        ([], {}),
        ([micro], {"tokens_per_micro_batch": longest}),
        ([checkpointing], {"gradient_checkpointing": True}),
        ([few], {"generation_token_budget": 8 * longest}),
    ]
    thrifty.append(
        (
            [micro, few, checkpointing],
            {name: value for _, settings in thrifty for name, value in settings.items()},
        )
    )
    for name in (None, "lora", "qlora") if hasattr(stage, "adapter") else (None,):
        adapted = stage if name is None else copy.copy(stage)
        if name is not None:
            adapted.adapter = adapter = shipped_adapter(name)  # type: ignore[attr-defined]
            shapes = {
                role: shape_of(source, adapter, role == stage.trains)
                for role in shapes
                if (source := stage.source(role)) is not None
            }
        for changes, settings in thrifty:
            other = _with(adapted, **settings)
            if max(peak_bytes(other, shapes, longest, prompt).values()) <= available:
                return " ".join([*([f"adapter={name}"] if name else []), *changes])
    return None


def _with(
    stage: ModelStage, generation_token_budget: int | None = None, **hardware: Any
) -> ModelStage:
    """A copy of a stage with other hardware settings."""
    other = copy.copy(stage)
    other.hardware = dataclasses.replace(stage.hardware, **hardware)
    if generation_token_budget is not None and getattr(stage, "rollout", None) is not None:
        rollout: Any = copy.copy(stage.rollout)  # type: ignore[attr-defined]
        tokens = min(generation_token_budget, rollout.token_budget.tokens)
        rollout.token_budget = TokenBudget(tokens, "hardware.generation_token_budget")
        other.rollout = rollout  # type: ignore[attr-defined]
    return other


def shipped_adapter(name: str) -> Adapter:
    """The adapter that `adapter=<name>` of the shipped config gives."""
    nodes: list[Any] = []
    while name:
        node: Any = OmegaConf.load(config_dir() / "adapter" / f"{name}.yaml")
        nodes.insert(0, node)
        name = next((part for part in node.pop("defaults", []) if part != "_self_"), "")
    merged: Any = OmegaConf.merge(*nodes)
    adapter: Adapter = build(merged)
    return adapter


def machine_bytes(hardware: Hardware) -> int | None:
    """Return the memory of the configured device in bytes; None if nothing tells it."""
    if hardware.memory_gb is not None:
        return round(hardware.memory_gb * 2**30)
    device = hardware.device
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return None
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def gigabytes(size: float) -> str:
    """Return a number of bytes as text, in units of 10^9 bytes."""
    return f"{size / 1e9:.1f} GB"
