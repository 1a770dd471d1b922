"""What the plan says of memory: estimated peaks, whether they fit, and what would make them fit."""

import copy
import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from omegaconf import OmegaConf

from rlt.config.build import build
from rlt.config.compose import config_dir
from rlt.llm.adapters import Adapter, LoRA
from rlt.llm.device import Hardware
from rlt.llm.model_sources import Adapted
from rlt.llm.token_budget import TokenBudget
from rlt.preflight.memory_estimate import Lengths, Shape, longest_row, peak_bytes, shape_of
from rlt.stages.stage import ModelStage


def memory_in_words(
    stage: ModelStage, shapes: Mapping[str, Shape], lengths: Lengths
) -> tuple[str, list[str]]:
    """Return the estimated peaks as text, and a warning if they are more than the memory."""
    longest, prompt = longest_row(stage, lengths)
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
    for override, adapter in _adapters_to_try(stage):
        adapted, sizes = copy.copy(stage), shapes
        if adapter is not None:
            adapted.adapter = adapter  # type: ignore[attr-defined]
            sizes = {
                role: shape_of(source, adapter, role == stage.trains)
                for role in shapes
                if (source := stage.source(role)) is not None
            }
        for settings in _thriftier_settings(adapted, longest):
            other = with_settings(adapted, settings)
            if max(peak_bytes(other, sizes, longest, prompt).values()) <= available:
                return " ".join([*override, *(f"{k}={_yaml(v)}" for k, v in settings.items())])
    return None


def _adapters_to_try(stage: ModelStage) -> Iterator[tuple[list[str], Any]]:
    """Overrides and the adapter that they give; a model that has one keeps it."""
    yield [], None
    trained: Any = stage.source(stage.trains) if stage.trains is not None else None
    if not hasattr(stage, "adapter") or isinstance(trained, Adapted):
        return
    if isinstance(stage.adapter, LoRA):
        if stage.adapter.quantization is None:
            quantised = dataclasses.replace(stage.adapter, quantization="nf4")
            yield ["adapter.quantization=nf4"], quantised
        return
    for name in ("lora", "qlora"):
        yield [f"adapter={name}"], shipped_adapter(name)


def _thriftier_settings(stage: ModelStage, longest: int) -> list[dict[str, Any]]:
    """Settings that take less memory than the stage's own: none, each alone, and all."""
    hardware = stage.hardware
    every: dict[str, Any] = {}
    if hardware.micro_batch_tokens > longest:
        every["hardware.tokens_per_micro_batch"] = longest
    if not hardware.gradient_checkpointing:
        every["hardware.gradient_checkpointing"] = True
    if hardware.generation_token_budget > 8 * longest:
        every["hardware.generation_token_budget"] = 8 * longest
    if _copies_codes(stage):
        every["rollout.linear_dtype"] = None
    return [{}, *({name: value} for name, value in every.items()), every]


def _copies_codes(stage: ModelStage) -> bool:
    """Whether sampling makes copies in float32 of layers that are held in four bits."""
    rollout: Any = getattr(stage, "rollout", None)
    adapter: Any = getattr(stage, "adapter", None)
    held = getattr(adapter, "quantization", None) is not None
    return held and getattr(rollout, "linear_dtype", None) is not None


def with_settings(stage: ModelStage, settings: Mapping[str, Any]) -> ModelStage:
    """Return a copy of a stage with other settings of its hardware and its rollout.

    Args:
        settings: `hardware.<name>` or `rollout.<name>` → value.
    """
    other: Any = copy.copy(stage)
    parts: dict[str, dict[str, Any]] = {"hardware": {}, "rollout": {}}
    for key, value in settings.items():
        part, _, name = key.partition(".")
        parts[part][name] = value
    other.hardware = dataclasses.replace(stage.hardware, **parts["hardware"])
    tokens = parts["hardware"].get("generation_token_budget")
    if tokens is not None:
        parts["rollout"]["token_budget"] = TokenBudget(tokens, "hardware.generation_token_budget")
    if parts["rollout"] and getattr(stage, "rollout", None) is not None:
        other.rollout = copy.copy(other.rollout)
        vars(other.rollout).update(parts["rollout"])
    return other


def _yaml(value: Any) -> str:
    """A setting's value as the command line takes it."""
    return "null" if value is None else str(value).lower()


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
    """Return the memory of the configured device in bytes; None if nothing tells it.

    A device that is there is asked, and `memory_gb` can only lower what it says.
    """
    told = None if hardware.memory_gb is None else round(hardware.memory_gb * 2**30)
    device = hardware.device
    if device.type != "cuda":
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return found if told is None else told
    if not torch.cuda.is_available():
        return told
    found = torch.cuda.get_device_properties(device).total_memory
    return found if told is None else min(found, told)


def gigabytes(size: float) -> str:
    """Return a number of bytes as text, in units of 10^9 bytes."""
    return f"{size / 1e9:.1f} GB"
