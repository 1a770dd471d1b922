"""Training modules over tiny models, and the trainer that fits them."""

import copy
import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from transformers import get_scheduler

from rlt.data.batches import StepDataModule
from rlt.data.problem import Problem, make_problem
from rlt.data.renderer import Renderer
from rlt.llm.models import LanguageModel, freeze
from rlt.rewards import Reward, RewardScorer, SolutionLogProb, ThoughtKL
from rlt.sampling import Completion
from rlt.training import RL, SFT, Example, Teaching
from rlt.training.algorithms import Algorithm
from rlt.training.rollout_batch import RolloutBatch

SGD = functools.partial(torch.optim.SGD, lr=0.1)
CONSTANT = functools.partial(get_scheduler, name="constant")
GRPO = Algorithm(
    aggregation="sequence_mean",
    objective="clip",
    ratio="token",
    epsilon_low=0.2,
    epsilon_high=0.2,
    beta=0.0,
    importance_weighted_k3=False,
    scale_rewards=True,
    negative_weight=1.0,
    mask_overlong=False,
    correction="none",
    correction_cap=2.0,
    num_iterations=1,
    minibatches=1,
    reference_update_every_steps=None,
    reference_mix_up=0.9,
)
CISPO = replace(GRPO, objective="cispo", epsilon_low=None, epsilon_high=1.5)
PAPER = replace(GRPO, beta=0.04, importance_weighted_k3=True)
PROBLEMS = [make_problem("1 + 1?", "2"), make_problem("What is 10 - 3?", "7")]


def trainer(folder: Path, **options: Any) -> L.Trainer:
    return L.Trainer(
        **{
            "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
            "limit_val_batches": 0, "default_root_dir": folder,
        }
        | options
    )  # fmt: skip


def apart_from_the_cut(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics that must not depend on the cut into micro-batches."""
    of_the_cut = ("time/", "padding_fraction", "tokens_per_micro_batch")
    return {k: v for k, v in metrics.items() if not any(part in k for part in of_the_cut)}


def weights(model: Any) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


class ScriptedRollout:
    """The same completions for every prompt, of several lengths; the last one is cut by length."""

    temperature = 0.7
    max_new_tokens = 12

    def __init__(self, renderer: Renderer, texts: Sequence[str]) -> None:
        self.renderer, self.texts = renderer, texts

    def prepare(self, model: Any, tokenizer: Any) -> None:
        """Nothing."""

    def sample(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        n: int,
        stop: str,
        seeds: Any = None,
    ) -> list[list[Completion]]:
        assert not model.training and n == len(self.texts) and stop == "</think>"
        ids = [self.renderer.encode(text) for text in self.texts]
        finish = ["stop" if stop in text else "length" for text in self.texts]
        return [[Completion(i, [], f) for i, f in zip(ids, finish, strict=True)] for _ in prompts]


TEXTS = ("one</think>", "a b c</think>", "</think>", "so on and on")


def paper_reward(temperature: float | None = None) -> Reward:
    terms = {
        "r_ss": SolutionLogProb({"mean": 1.0, "min": 0.01}),
        "kl": ThoughtKL({"mean": 3.0, "max": 0.03}),
    }
    return Reward(terms, temperature=temperature)


def teacher_rl(
    renderer: Renderer, teacher: LanguageModel, tokens_per_micro_batch: int = 9999,
    reward: Any = None, optim: Any = SGD, student: Any = None, rollout: Any = None,
    steps: int = 10, completions: int = len(TEXTS), gradient_checkpointing: bool = False,
    **algorithm: Any,
) -> RL:  # fmt: skip
    rollout = rollout or ScriptedRollout(renderer, TEXTS)
    reference = freeze(copy.deepcopy(teacher.model))
    scorer = RewardScorer(
        reward or paper_reward(), student or reference, renderer,
        temperature=rollout.temperature, token_budget=tokens_per_micro_batch,
    )  # fmt: skip
    return RL(
        teacher.model, renderer, reference, Teaching(renderer, scorer), rollout,
        replace(PAPER, **algorithm), optim, CONSTANT, steps, completions, 1.0,
        tokens_per_micro_batch, samples_per_step=0, monitor_every_steps=5,
        gradient_checkpointing=gradient_checkpointing,
    )  # fmt: skip


def scored(module: RL, problems: list[Problem]) -> RolloutBatch:
    """A rollout of the module, with its rewards."""
    rollout = module.sample(problems)
    module.score(rollout)
    return rollout


def fit_rl(module: RL, steps: int, folder: Path, **options: Any) -> L.Trainer:
    made = trainer(folder, **options)
    made.fit(module, datamodule=StepDataModule(PROBLEMS, PROBLEMS, 2, steps, None, 0))
    return made


def fit_sft(
    renderer: Renderer, language_model: LanguageModel, folder: Path, tokens_per_micro_batch: int =
    9999, steps: int = 2, optim: Any = SGD, **options: Any,
) -> dict[str, float]:  # fmt: skip
    texts = ["a", "bc", "def ghi", "j", "klmno", "p q r s", "tu", "vwxyz 123"]
    examples = [
        Example(
            renderer.teacher_prompt(make_problem("?" * (i % 3 + 1), "2")),
            renderer.encode(text),
            text,
        )
        for i, text in enumerate(texts)
    ]
    module = SFT(
        language_model.model,
        renderer,
        optim,
        CONSTANT,
        steps,
        1.0,
        tokens_per_micro_batch,
        **options,
    )
    made = trainer(folder)
    made.fit(module, datamodule=StepDataModule(examples, [], 8, steps, None, 0))
    return {name: float(value) for name, value in made.callback_metrics.items()}
