"""`hardware.tokens_per_micro_batch=auto`: as many tokens at once as the free memory holds.

The number is found when a run begins, by the estimate that the plan prints
(`rlt.preflight.memory_estimate`), and is kept in the run's manifest: a resumed run cuts its
micro-batches as before, and so goes on bitwise.
"""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from omegaconf import DictConfig

from rlt.llm.device import Hardware
from rlt.preflight.inputs import look_at
from rlt.preflight.memory_advice import machine_bytes, with_settings
from rlt.preflight.memory_estimate import (
    CUDA_BYTES,
    Lengths,
    Shape,
    held_bytes,
    longest_row,
    peak_bytes,
)
from rlt.runs import ranks
from rlt.runs.folder import RunFolder
from rlt.stages.stage import ModelStage, Stage

log = logging.getLogger(__name__)

# More tokens at once make no step faster.
_MOST, _MOST_ON_CPU = 32_768, 8_192
# Share of the free memory that an estimate may take; the rest is for what it misses.
_SHARE = 0.85
_NAME = "tokens_per_micro_batch"


def settle_token_budget(cfg: DictConfig, stage: Stage, run: RunFolder) -> None:
    """Put a number in place of a stage's `hardware.tokens_per_micro_batch=auto`.

    Raises:
        ValueError: a hub that is not reached keeps the models' sizes.
    """
    if not isinstance(stage, ModelStage) or stage.hardware.tokens_per_micro_batch != "auto":
        return
    tokens = run.manifest.get(_NAME)
    if tokens is None:
        seen = look_at(cfg, stage, {}, {})
        shapes, lengths = seen.shapes, seen.lengths
        if lengths is None or not shapes.keys() >= set(stage.roles):
            raise ValueError(
                "hardware.tokens_per_micro_batch=auto needs the models' configs and the data, and "
                "a hub was not reached; give a number"
            )
        found = lengths
        tokens = min(
            ranks.gather(lambda: tokens_that_fit(stage, shapes, found), "looking at the memory")
        )
        run.record(**{_NAME: tokens})
    log.info("hardware.tokens_per_micro_batch=auto: %d", tokens)
    stage.hardware = dataclasses.replace(stage.hardware, tokens_per_micro_batch=tokens)


def tokens_that_fit(stage: ModelStage, shapes: Mapping[str, Shape], lengths: Lengths) -> int:
    """Return the largest power of two of tokens whose estimated peaks fit the free memory.

    Where none fits, it is the length of the longest row, as a micro-batch has at least one, and a
    warning is given.

    Args:
        shapes: role → shape of each model that the stage loads.
        lengths: of a sample of the stage's rows.
    """
    longest, prompt = longest_row(stage, lengths)
    free = free_bytes(stage.hardware)
    tokens = _MOST_ON_CPU if stage.hardware.device.type == "cpu" else _MOST
    while tokens > longest and free is not None:
        tried = with_settings(stage, {f"hardware.{_NAME}": tokens})
        peaks = peak_bytes(tried, shapes, longest, prompt)
        peaks.pop("rollout", None)  # whose tokens are hardware.generation_token_budget
        if max(peaks.values(), default=0) <= _SHARE * free:
            return tokens
        tokens //= 2
    if free is None:
        return tokens
    log.warning(
        "hardware.tokens_per_micro_batch=auto: by estimate, %.1f GB of free memory hold no more "
        "than one row of %d tokens at once, if that (check=true tells more)",
        free / 1e9,
        longest,
    )
    return longest


def free_bytes(hardware: Hardware) -> int | None:
    """Return the bytes that this process holds or may still take; None if nothing tells it.

    It is at most what `machine_bytes` tells of the whole device.
    """
    whole = machine_bytes(hardware)
    free = None
    if hardware.device.type == "cuda" and torch.cuda.is_available():
        free = torch.cuda.mem_get_info(hardware.device)[0] + CUDA_BYTES
    elif hardware.device.type == "cpu" and (file := Path("/proc/meminfo")).is_file():
        lines = file.read_text(encoding="utf-8").splitlines()
        free = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvail"))
        free += held_bytes()
    return min((size for size in (free, whole) if size is not None), default=None)
