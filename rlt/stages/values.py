"""Values in a stage's config, tried before data is read or weights are loaded.

Every part that needs neither is built once; all that is wrong is told together.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from rlt.config.allowed_targets import raise_if_any
from rlt.config.build import build, build_partial
from rlt.config.suggestions import did_you_mean
from rlt.data.traces import FORMATS

# Smallest whole number that each of these may be; null, where the key takes it, is no number.
_AT_LEAST = {
    "attributed": 0,
    "best_of": 1,
    "callbacks.checkpoint.every_steps": 1,
    "callbacks.checkpoint.keep": 2,
    "datamodule.batch_size": 1,
    "datamodule.epochs": 1,
    "datamodule.steps": 1,
    "datamodule.validation_batch_size": 1,
    "hardware.generation_token_budget": 1,
    "hardware.threads": 1,
    "hardware.tokens_per_micro_batch": 1,
    "max_examples": 1,
    "max_problems": 1,
    "max_student_tokens": 1,
    "module.group_size": 2,
    "module.monitor_every_steps": 1,
    "module.samples_per_step": 0,
    "problems_per_batch": 1,
    "questions_per_batch": 1,
    "rank": 1,
    "rows_per_batch": 1,
    "samples": 1,
    "validation_answers": 0,
}
_CHOICES = {
    "format": FORMATS,
    "hardware.dtype": ("float32", "bfloat16", "float16", "auto"),
    "hardware.precision": (
        *("32-true", "32", "bf16-mixed", "bf16-true", "bf16", "64-true", "64"),
        *("16-mixed", "16-true", "16"),
    ),
}


def check_values(cfg: DictConfig) -> dict[str, Any]:
    """The parts of a stage that need neither data nor weights, by their config key.

    Raises:
        ValueError: values that do not go together, or that a part refuses; all of them.
    """
    errors = _bounds(cfg) + _choices(cfg)
    parts = {
        key: _attempt(key, partial(build, cfg[key]), errors)
        for key in ("prompt", "reward", "credit", "algorithm", "rollout", "preflight")
        if cfg.get(key) is not None
    }
    for name, node in (cfg.get("callbacks") or {}).items():
        if node is not None and not any(e.startswith(f"callbacks.{name}.") for e in errors):
            _attempt(f"callbacks.{name}", partial(build, node), errors)
    if cfg.get("optim") is not None:
        weights = [torch.nn.Parameter(torch.zeros(2, 2))]
        optimizer = _attempt("optim", lambda: build_partial(cfg.optim)(weights), errors)
        if optimizer is not None:
            _attempt(
                "schedule",
                lambda: build_partial(cfg.schedule)(optimizer=optimizer, num_training_steps=100),
                errors,
            )
        if str(cfg.hardware.precision).startswith("16"):
            errors.append(
                f"hardware.precision={cfg.hardware.precision}: float16 needs loss scaling, which "
                "training does not do; choose bf16-mixed, bf16-true or 32-true"
            )
    share = cfg.get("keep_fraction", 1.0)
    if not 0 < share <= 1:
        errors.append(f"keep_fraction={share}: must be above 0 and at most 1")
    if cfg.get("temperature", 1.0) <= 0:
        errors.append(f"temperature={cfg.temperature}: must be above 0")
    if cfg.get("rank", 1) > cfg.get("best_of", 1) >= 1:
        errors.append(f"rank={cfg.rank}: of best_of={cfg.best_of} completions there is no such one")
    raise_if_any(errors)
    return parts


def require_device(cfg: DictConfig) -> None:
    """Raises ValueError when the config asks for a GPU and there is none."""
    if cfg.hardware.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"hardware.accelerator={cfg.hardware.accelerator}: torch {torch.__version__} sees no "
            "CUDA device; choose hardware=cpu, or install torch's CUDA build and its driver"
        )


def _bounds(cfg: DictConfig) -> list[str]:
    errors = []
    for key, least in _AT_LEAST.items():
        value = OmegaConf.select(cfg, key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            errors.append(f"{key}={value}: must be a whole number of at least {least}")
    return errors


def _choices(cfg: DictConfig) -> list[str]:
    errors = []
    for key, choices in _CHOICES.items():
        value = OmegaConf.select(cfg, key)
        if value is not None and str(value) not in choices:
            errors.append(
                f"{key}={value}: choose {', '.join(choices)}{did_you_mean(str(value), choices)}"
            )
    return errors


def _attempt(key: str, make: Callable[[], Any], errors: list[str]) -> Any:
    """What `make` makes; None, and a line in `errors`, if the values are refused."""
    try:
        return make()
    except InstantiationException as error:  # a nested node refused its values
        where = str(error).partition("full_key: ")[2]
        errors.append(f"{key}.{where}: {error.__cause__}" if where else f"{key}: {error}")
    except (ValueError, OSError) as error:  # says itself which key it is
        errors.append(str(error) if key in str(error) else f"{key}: {error}")
    except TypeError as error:
        errors.append(f"{key}: a value is of the wrong type: {error}")
    return None
