"""What the stages that train share: Lightning's Trainer around a module, checkpoints, the model."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from transformers import PreTrainedModel

from rlt.config.allowed_targets import raise_if_any
from rlt.config.build import attempt, bound_settings
from rlt.config.fields import passes
from rlt.data.batches import StepDataModule, total_steps
from rlt.data.dataset import ProblemData
from rlt.data.problem import Problem
from rlt.data.renderer import Renderer
from rlt.llm.adapter_layers import merged_copy
from rlt.llm.adapters import Adapter, NoAdapter
from rlt.llm.models import LanguageModel, context_tokens, save_model
from rlt.report.results import sft_result
from rlt.runs import ranks
from rlt.runs.environment import peak_memory_bytes
from rlt.runs.files import read_json, write_json
from rlt.runs.folder import RunFolder
from rlt.runs.signals import Terminated
from rlt.stages.common import load_data
from rlt.stages.examples import require_explanations, without_explanation
from rlt.stages.stage import RUN_FILES, Inputs, ModelStage
from rlt.training import SFT, Example
from rlt.training.callbacks import Checkpoint
from rlt.training.checkpoints import CHECKPOINTS, newest_whole
from rlt.training.lightning_private import stop_alone_on_sigterm
from rlt.training.policy import PolicyModule
from rlt.training.strategies import OTHER_STRATEGY, STRATEGIES, trainer_settings

log = logging.getLogger(__name__)

# Settings of the hardware that modules take.
MEMORY_SETTINGS = ("tokens_per_micro_batch", "gradient_checkpointing")
# What code adds to the callbacks of the config, in a process of its own.
ADDED_CALLBACKS: list[L.Callback] = []


@dataclass(kw_only=True)
class TrainingStage(ModelStage):
    """A stage that trains a model with Lightning and saves it."""

    module: Callable[..., PolicyModule]
    datamodule: Callable[..., StepDataModule] = passes("train", "validation", "seed")
    optim: Callable[..., torch.optim.Optimizer] = passes("params")
    schedule: Callable[..., Any] = passes("optimizer", "num_training_steps")
    trainer: Callable[..., L.Trainer] = passes("callbacks", "default_root_dir", "logger")
    callbacks: Mapping[str, L.Callback] | None

    makes: ClassVar[str | None] = "model"
    leaves: ClassVar[tuple[str, ...]] = (*RUN_FILES, "model/", "checkpoints/")

    def __post_init__(self) -> None:
        super().__post_init__()
        raise_if_any(self.optimizer_errors())

    def optimizer_errors(self) -> list[str]:
        """What optimizer and schedule refuse, seen on a small matrix, and settings that exclude."""
        errors: list[str] = []
        weights = [torch.nn.Parameter(torch.zeros(2, 2))]
        optimizer = attempt("optim", lambda: self.optim(weights), errors)
        if optimizer is not None:
            settings = {"optimizer": optimizer, "num_training_steps": 100}
            attempt("schedule", lambda: self.schedule(**settings), errors)
        if self.hardware.shards > 1 and self.adapting.quantization is not None:
            errors.append(
                f"hardware.strategy=fsdp with adapter.quantization={self.adapting.quantization}: "
                "quantised weights cannot be divided among ranks; choose adapter=lora, or "
                "hardware=ddp"
            )
        if self.hardware.precision.startswith("16"):
            errors.append(
                f"hardware.precision={self.hardware.precision}: float16 needs loss scaling, which "
                "training does not do; choose bf16-mixed, bf16-true or 32-true"
            )
        return errors

    @property
    def adapting(self) -> Adapter:
        """What is trained of the model; all of it where the stage has no key `adapter`."""
        return getattr(self, "adapter", None) or NoAdapter()

    @property
    def scaled_optim(self) -> Callable[..., torch.optim.Optimizer]:
        """The config's optimizer, with its learning rate multiplied by `adapter.lr_factor`."""
        lr, factor = bound_settings(self.optim).get("lr"), self.adapting.lr_factor
        if lr is None or factor == 1:
            return self.optim
        return partial(self.optim, lr=float(f"{lr * factor:.12g}"))  # 1e-5, not 9.99…e-06

    @property
    def memory_settings(self) -> dict[str, Any]:
        """Arguments by which the module cuts its batches to the memory of the hardware."""
        return {
            "tokens_per_micro_batch": self.hardware.micro_batch_tokens,
            "gradient_checkpointing": self.hardware.gradient_checkpointing,
        }

    def load_model(self, role: str) -> LanguageModel:
        """Weights and tokenizer of a role, held as the adapter wants them."""
        language_model = super().load_model(role)
        self.adapting.prepare(language_model.model)
        return language_model

    def load_policy(self) -> LanguageModel:
        """The model of the trained role, with its adapter if it has one."""
        assert self.trains is not None
        language_model = self.load_model(self.trains)
        self.adapting.add_to(language_model.model)
        return language_model

    def batches_of(self, train: Sequence[Any], validation: Sequence[Any]) -> StepDataModule:
        """The config's batches of training and validation items."""
        return self.datamodule(train=train, validation=validation, seed=self.seed)

    def train(
        self, run: RunFolder, module: PolicyModule, datamodule: StepDataModule, logger: Any
    ) -> dict[str, float]:
        """Validate, fit (from the newest whole checkpoint, if any), validate, save the model.

        Returns:
            Final metrics: the validation before training under `start/`, the last training values,
            and the validation after it.
        """
        folder = run.folder
        callbacks = [*(self.callbacks or {}).values(), *ADDED_CALLBACKS]
        settings = bound_settings(self.trainer)
        interval = min(settings["val_check_interval"], datamodule.steps)
        changes: dict[str, Any] = {"val_check_interval": interval}
        if not datamodule.validation:
            changes["limit_val_batches"] = 0  # Lightning warns of a loader without batches
        changes |= trainer_settings(self.hardware.strategy)
        trainer = self.trainer(
            default_root_dir=str(folder), logger=logger or False, callbacks=callbacks, **changes
        )
        if ranks.world_size() > 1:
            stop_alone_on_sigterm(trainer)
        checkpoint = ranks.from_main(
            lambda: newest_whole(folder / CHECKPOINTS), "looking for checkpoints"
        )
        start_file = folder / "start.json"

        def validate() -> dict[str, float]:
            (found,) = trainer.validate(
                module, datamodule=datamodule, verbose=False, weights_only=True
            )
            return dict(found)

        held_out = len(datamodule.validation) > 0
        begun = ranks.from_main(start_file.is_file, "looking for checkpoints")
        if held_out and not begun:
            write_json(start_file, validate())
        if checkpoint is not None:
            log.info("resuming from %s", checkpoint.name)
        try:
            trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
        except SIGTERMException as stop:
            # Python discards an exception that a signal handler raises while C code calls back;
            # Lightning has noted the signal all the same.
            raise Terminated from stop
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        if held_out:
            if datamodule.steps % interval or not any(k.startswith("validation/") for k in metrics):
                metrics |= validate()  # else the last step has just been validated
            before = ranks.from_main(lambda: read_json(start_file), "reading the first validation")
            metrics |= {f"start/{k}": v for k, v in before.items()}
        # Resumed after the very last step, nothing was trained on: the checkpoint has its values.
        restored = next((c.metrics for c in callbacks if isinstance(c, Checkpoint)), {})
        metrics = restored | metrics
        metrics["resources/peak_memory_bytes"] = float(peak_memory_bytes())
        policy = module.plain_policy()  # of all ranks together

        def save() -> None:
            assert policy is not None
            self.save(policy, module.renderer, folder)

        ranks.from_main(save, "saving the model")
        run.record(tags=module.renderer.style.tags)
        return metrics

    def save(self, policy: PreTrainedModel, renderer: Renderer, folder: Path) -> None:
        """Save the trained model, and the merged one if the adapter makes one."""
        save_model(policy, renderer.tokenizer, folder / "model")
        if self.adapting.merge:
            save_model(merged_copy(policy), renderer.tokenizer, folder / "merged")

    @property
    def files(self) -> tuple[str, ...]:
        """What the run leaves: the merged model too, if the adapter makes one."""
        return (*self.leaves, "merged/") if self.adapting.merge else self.leaves

    # --- what a plan asks ------------------------------------------------------------------------

    def _known_steps(self, train: int | None) -> int | None:
        known = bound_settings(self.datamodule)
        if known["steps"] is None and train is None:
            return None
        return total_steps(train or 1, known["batch_size"], known["steps"], known["epochs"])

    def count_steps(self, inputs: Inputs) -> int | None:
        return self._known_steps(None if inputs.problems is None else len(inputs.problems))

    @property
    def batch_size(self) -> int:
        """Items of a step."""
        return int(bound_settings(self.datamodule)["batch_size"])

    @property
    def rows_per_step(self) -> int:
        return self.batch_size

    def does(self, inputs: Inputs) -> list[str]:
        steps = self.count_steps(inputs)
        rate = bound_settings(self.scaled_optim).get("lr")
        return [f"{'?' if steps is None else steps} steps of {self.batch_size}, lr {rate}"]

    def warnings(self, inputs: Inputs) -> list[str]:
        found = []
        if self.hardware.strategy not in STRATEGIES:
            found.append(f"on several devices, this run would be refused: {OTHER_STRATEGY}")
        train = None if inputs.problems is None else len(inputs.problems)
        if train is not None and self.batch_size > train:
            found.append(
                f"datamodule.batch_size={self.batch_size} is more than the {train} training "
                "problems: a step trains on some of them twice"
            )
        return found


@dataclass(kw_only=True)
class SFTStage(TrainingStage):
    """A stage that fine-tunes a model on examples."""

    module: Callable[..., SFT] = passes(
        *("policy", "renderer", "optim", "schedule", "optimizer_steps", *MEMORY_SETTINGS),
        "answer_accuracy",
    )

    def fit(
        self,
        run: RunFolder,
        renderer: Renderer,
        train: list[Example],
        validation: list[Example],
        answer_accuracy: Callable[[Any], float] | None = None,
    ) -> dict[str, float]:
        """Fine-tune the model of the trained role on examples and save it."""
        datamodule = self.batches_of(train, validation)
        language_model = self.load_policy()
        require_fit(train + validation, context_tokens(language_model.model))
        module = self.module(
            policy=language_model.model,
            renderer=renderer,
            optim=self.scaled_optim,
            schedule=self.schedule,
            optimizer_steps=datamodule.steps,
            **self.memory_settings,
            answer_accuracy=answer_accuracy,
        )
        return self.train(run, module, datamodule, self.make_logger(run.folder))

    def examples(self, problems: Sequence[Problem], renderer: Renderer) -> list[Example]:
        """What the model is trained on."""
        raise NotImplementedError

    def rows(
        self, problems: Sequence[Problem], renderer: Renderer
    ) -> list[tuple[list[int], list[int]]]:
        return [(one.prompt, one.target) for one in self.examples(problems, renderer)]

    def check_lengths(
        self, contexts: Mapping[str, int], problems: Sequence[Problem], renderer: Renderer
    ) -> None:
        examples = self.examples(problems, renderer)
        if examples and contexts:
            require_fit(examples, next(iter(contexts.values())))

    @staticmethod
    def result(run: Any) -> list[str]:
        return sft_result(run)


@dataclass(kw_only=True)
class ExplainedStage(SFTStage):
    """A stage that fine-tunes a model on the data's own explanations."""

    data: ProblemData

    def run(self, run: RunFolder) -> dict[str, float]:
        renderer = self.load_renderer()
        split = load_data(self.data, renderer)
        run.record(data=split.report | {"without_explanation": without_explanation(split.train)})
        require_explanations(split.train)
        train, validation = (
            self.examples(problems, renderer) for problems in (split.train, split.validation)
        )
        return self.fit(run, renderer, train, validation)

    def read(self, renderer: Renderer | None) -> Inputs:
        inputs = super().read(renderer)
        if inputs.problems is not None:
            require_explanations(inputs.problems)
        return inputs


def require_fit(examples: Sequence[Example], context: int) -> None:
    """Raises ValueError when an example is longer than the model's context, in tokens."""
    longest = max(len(e.prompt) + len(e.target) for e in examples)
    if longest > context:
        raise ValueError(
            f"the longest example has {longest} tokens, the model's context holds "
            f"{context}; lower data.max_tokens"
        )
