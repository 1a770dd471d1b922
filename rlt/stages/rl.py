"""What teacher RL and student RL share: weights told by role, and the module put together."""

import logging
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig
from torch import nn
from transformers import PreTrainedModel

from rlt.config.build import build, build_partial
from rlt.data.dataset import ProblemData
from rlt.data.renderer import Renderer
from rlt.llm.models import LanguageModel, fingerprint
from rlt.report import HELD_OUT_FILE, SampleWriter, StepRows
from rlt.runs.folder import RunFolder
from rlt.stages.common import make_logger, train
from rlt.training.algorithms import Algorithm
from rlt.training.credit import Credit
from rlt.training.tasks import Task

log = logging.getLogger(__name__)


def fit_rl(
    cfg: DictConfig,
    run: RunFolder,
    renderer: Renderer,
    language_model: LanguageModel,
    reference: PreTrainedModel | None,
    task: Task,
    rollout: Any,
    algorithm: Algorithm,
    data: ProblemData,
    datamodule: Any,
    credit: Credit | None = None,
) -> dict[str, float]:
    """Train a policy on the rewards of its task and save it."""
    logger = make_logger(cfg, run.folder)
    module = build(
        cfg.module,
        policy=language_model.model,
        renderer=renderer,
        reference=reference,
        task=task,
        rollout=rollout,
        algorithm=algorithm,
        credit=credit,
        optim=build_partial(cfg.optim),
        schedule=build_partial(cfg.schedule),
        optimizer_steps=datamodule.steps * algorithm.optimizer_steps_per_rollout,
        gradient_checkpointing=cfg.hardware.gradient_checkpointing,
        behaviour=data.behaviour,
        on_samples=SampleWriter(run.folder, logger),
        on_held_out=StepRows(run.folder / HELD_OUT_FILE),
    )
    return train(cfg, run, module, datamodule, logger)


def record_weights(run: RunFolder, models: Mapping[str, nn.Module | None]) -> None:
    """Say and write down what is in memory, by role; the first model is the one that is trained."""
    held = bytes_by_role(models)
    log.info(
        "weights in memory: %s",
        ", ".join(f"{roles} {size / 2**20:,.0f} MiB" for roles, size in held.items()),
    )
    policy = next(iter(models.values()))
    assert policy is not None
    metadata: dict[str, Any] = {
        role: fingerprint(model)
        for role, model in models.items()
        if model is not None and role != "reference"
    }
    metadata["parameters"] = sum(p.numel() for p in policy.parameters())
    run.record(models=metadata | {"bytes_in_memory": held})


def bytes_by_role(models: Mapping[str, nn.Module | None]) -> dict[str, int]:
    """Bytes of parameters in memory; roles that one object serves are named together."""
    roles: dict[int, list[str]] = {}
    for role, model in models.items():
        if model is not None:
            roles.setdefault(id(model), []).append(role)
    named = {" and ".join(names): models[names[0]] for names in roles.values()}
    return {
        name: sum(p.numel() * p.element_size() for p in model.parameters())
        for name, model in named.items()
        if model is not None
    }
