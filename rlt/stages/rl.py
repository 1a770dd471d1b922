"""What teacher RL and student RL share: the RL module put together, weights told by role."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from rlt.config.allowed_targets import raise_if_any
from rlt.config.build import bound_settings
from rlt.config.fields import passes
from rlt.data.batches import StepDataModule
from rlt.data.dataset import ProblemData
from rlt.data.problem import Problem
from rlt.data.renderer import Renderer
from rlt.llm.adapters import Adapter
from rlt.llm.models import LanguageModel, fingerprint
from rlt.report import HELD_OUT_FILE, SampleWriter, StepRows
from rlt.report.results import rl_result
from rlt.runs.folder import RunFolder
from rlt.sampling import Rollout
from rlt.stages.stage import RUN_FILES, Inputs, Role
from rlt.stages.training import MEMORY_SETTINGS, TrainingStage
from rlt.training import RL
from rlt.training.algorithms import Algorithm
from rlt.training.credit import Credit
from rlt.training.tasks import Task

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class RLStage(TrainingStage):
    """A stage that trains a policy on the rewards of its own completions."""

    data: ProblemData
    adapter: Adapter
    algorithm: Algorithm
    rollout: Rollout
    module: Callable[..., RL] = passes(
        *("policy", "renderer", "optim", "schedule", "optimizer_steps", *MEMORY_SETTINGS),
        *("reference", "task", "rollout", "algorithm", "credit", "behaviour"),
        *("on_samples", "on_held_out"),
    )

    leaves: ClassVar[tuple[str, ...]] = (
        *RUN_FILES, "model/", "checkpoints/", "samples.jsonl", "held_out_rewards.jsonl",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        completions = self.rows_per_step
        if self.algorithm.minibatches > completions:
            raise_if_any(
                [
                    f"algorithm.minibatches={self.algorithm.minibatches} exceeds the {completions} "
                    "completions of a step; lower it, or raise datamodule.batch_size"
                ]
            )

    @property
    def group_size(self) -> int:
        """Completions of each problem."""
        return int(bound_settings(self.module)["group_size"])

    def fit(
        self,
        run: RunFolder,
        renderer: Renderer,
        language_model: LanguageModel,
        reference: nn.Module | None,
        task: Task,
        datamodule: StepDataModule,
        credit: Credit | None = None,
    ) -> dict[str, float]:
        """Train a policy on the rewards of its task and save it."""
        logger = self.make_logger(run.folder)
        module = self.module(
            policy=language_model.model,
            renderer=renderer,
            reference=reference,
            task=task,
            rollout=self.rollout,
            algorithm=self.algorithm,
            credit=credit,
            optim=self.scaled_optim,
            schedule=self.schedule,
            optimizer_steps=datamodule.steps * self.algorithm.optimizer_steps_per_rollout,
            **self.memory_settings,
            behaviour=self.data.behaviour,
            on_samples=SampleWriter(run.folder, logger),
            on_held_out=StepRows(run.folder / HELD_OUT_FILE),
        )
        return self.train(run, module, datamodule, logger)

    # --- what a plan asks ------------------------------------------------------------------------

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.group_size

    @property
    def completions(self) -> tuple[int, int]:
        return self.rows_per_step, self.group_size

    @property
    def holds_reference(self) -> bool:
        return self.algorithm.needs_reference

    def does(self, inputs: Inputs) -> list[str]:
        steps = self.count_steps(inputs)
        per_rollout = self.algorithm.optimizer_steps_per_rollout
        total = "?" if steps is None else str(steps * per_rollout)
        return [
            *super().does(inputs),
            f"{self.rows_per_step} completions a step, {total} optimizer steps in all",
            sampling_in_words(self.rollout),
        ]

    @staticmethod
    def result(run: Any) -> list[str]:
        return rl_result(run, "completions with an answer")


def sampling_in_words(rollout: Any) -> str:
    """A plan's line on how completions are sampled."""
    return f"T = {rollout.temperature}, at most {rollout.max_new_tokens} new tokens"


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
    metadata["trained_parameters"] = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    run.record(models=metadata | {"bytes_in_memory": held})


def bytes_by_role(models: Mapping[str, nn.Module | None]) -> dict[str, int]:
    """Bytes of parameters in memory; roles that one object serves are named together.

    Weights that several models share count for the first of them.
    """
    roles: dict[int, list[str]] = {}
    for role, model in models.items():
        if model is not None:
            roles.setdefault(id(model), []).append(role)
    named = {" and ".join(names): models[names[0]] for names in roles.values()}
    counted: set[int] = set()
    held = {}
    for name, model in named.items():
        assert model is not None
        own = {id(p): p.numel() * p.element_size() for p in model.parameters()}
        held[name] = sum(size for key, size in own.items() if key not in counted)
        counted |= set(own)
    return held


def require_room(
    context: int, problems: Sequence[Problem], prompt_tokens: Callable[[Problem], int],
    new_tokens: int, what: str, role: Role,
) -> None:  # fmt: skip
    """Raises ValueError when a prompt and what may follow outgrow a role's context, in tokens.

    Args:
        what: is written: an explanation, or an answer.
    """
    for problem in problems:
        needed = prompt_tokens(problem) + new_tokens
        if needed > context:
            raise ValueError(
                f"problem {problem.id} with an {what} of {new_tokens} tokens needs {needed} "
                f"tokens, the {role}'s context holds {context}; lower rollout.max_new_tokens or "
                "data.max_tokens"
            )
