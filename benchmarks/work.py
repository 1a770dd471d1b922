"""The work that benchmarks time: models, prompts of a length, completions, modules.

Everything comes from the config that `rlt` itself composes, so `hardware=...` and other overrides
mean what they mean there. Lengths are exact: completions are random ids, or are sampled with every
end of a turn out of reach, so that each arm of a comparison has the same work.
"""

import contextlib
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from benchmarks.common import wait
from rlt.config.build import build, build_partial, build_stage
from rlt.config.compose import config_dir
from rlt.data.batches import StepDataModule
from rlt.data.problem import Problem, make_problem
from rlt.data.renderer import Renderer
from rlt.llm.batching import Row
from rlt.llm.device import on_device
from rlt.llm.models import LanguageModel
from rlt.rewards import RewardScorer, ScoredExplanation
from rlt.sampling import Completion
from rlt.stages.teacher_rl import TeacherRL
from rlt.training import RL, SFT, Teaching
from rlt.training.rollout_batch import RolloutBatch

NEVER = "\u2402 never \u2402"  # a stop string that no model writes


@dataclass
class Work:
    """A composed config with its model on its device."""

    cfg: DictConfig
    model: Any
    renderer: Renderer

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that the prompts are rendered with."""
        return self.renderer.tokenizer

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        return torch.device(self.model.device)


def compose_stage(stage: str, model: str, overrides: Sequence[str]) -> DictConfig:
    """Compose the config of a stage as `rlt` does, with `model` as the teacher."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("config", [f"stage={stage}", f"model@teacher={model}", *overrides])


def device_for(cfg: DictConfig) -> torch.device:
    """The device that the config names.

    Raises:
        SystemExit: it is a GPU and there is none.
    """
    device = build(cfg.hardware).device
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: run this command on a machine that has one")
    return device


def load(stage: str, model: str, overrides: Sequence[str] = (), prepared: bool = True) -> Work:
    """Compose a stage's config and load its teacher.

    Args:
        prepared: set the process up as rlt does (`rlt.llm.device`); a peer runs as it comes, but
            for the number of threads.
    """
    cfg = compose_stage(stage, model, overrides)
    device = device_for(cfg)
    if prepared:
        build(cfg.hardware).prepare()
    elif cfg.hardware.threads:
        torch.set_num_threads(cfg.hardware.threads)
    torch.manual_seed(0)
    made: LanguageModel = build(cfg.teacher).load()
    if prepared:  # a peer adds the adapter itself
        adapter = build(cfg.adapter)
        adapter.prepare(made.model)
        adapter.add_to(made.model)
    renderer = Renderer(build(cfg.prompt), made.tokenizer)
    renderer.stop = NEVER  # every completion is cut by its length
    return Work(cfg, on_device(made.model, device), renderer)


# --- prompts and completions ----------------------------------------------------------------------


def problems_of(renderer: Renderer, count: int, prompt_tokens: int) -> list[Problem]:
    """Problems whose teacher prompts are the first to reach a number of tokens."""
    problems = []
    for seed in range(count):
        digits = random.Random(seed)
        words = [str(digits.randrange(10))]
        while True:
            problem = make_problem(" ".join(words), "7")
            missing = prompt_tokens - len(renderer.teacher_prompt(problem))
            if missing <= 0:
                break
            words += [str(digits.randrange(10)) for _ in range(max(1, missing // 4))]
        problems.append(problem)
    return problems


def random_ids(tokenizer: Any, count: int, tokens: int) -> list[list[int]]:
    """Completions of ordinary tokens, the same ones in every run."""
    special = set(tokenizer.all_special_ids)
    ordinary = [i for i in range(len(tokenizer)) if i not in special]
    return [random.Random(seed).choices(ordinary, k=tokens) for seed in range(count)]


@dataclass(frozen=True)
class Written:
    """B completions of ordinary tokens, group after group, as teacher and student see them."""

    problems: list[Problem]
    rows: list[Row]
    student_rows: list[Row]

    @property
    def prompt_tokens(self) -> list[int]:
        """The lengths of the teacher's prompts in tokens, each length once, ascending."""
        return sorted({len(prompt) for prompt, _ in self.rows})


def random_groups(
    renderer: Renderer, questions: int, completions: int, prompt_tokens: int, new_tokens: int
) -> Written:
    """Return groups of completions of exactly `new_tokens` random ids.

    Args:
        completions: for each question.
        prompt_tokens: length of each question's teacher prompt.
    """
    problems = problems_of(renderer, questions, prompt_tokens)
    owners = [problem for problem in problems for _ in range(completions)]
    ids = random_ids(renderer.tokenizer, len(owners), new_tokens)
    rows: list[Row] = [(renderer.teacher_prompt(p), i) for p, i in zip(owners, ids, strict=True)]
    texts = [renderer.student_text(p, i) for p, i in zip(owners, ids, strict=True)]
    return Written(owners, rows, [(text.prompt, text.continuation) for text in texts])


def scorer_of(module: RL) -> RewardScorer:
    """Return the scorer that gives the teacher's explanations their rewards."""
    assert isinstance(module.task, Teaching)
    return module.task.scorer


def scored_of(
    module: RL, group: Written, log_probs: Sequence[torch.Tensor]
) -> list[ScoredExplanation]:
    """What a rollout of these completions hands to the reward."""
    return [
        ScoredExplanation(problem, module.renderer.explanation(ids), prompt, values)
        for problem, (prompt, ids), values in zip(
            group.problems, group.rows, log_probs, strict=True
        )
    ]


def rollout_of(module: RL, group: Written, group_size: int) -> RolloutBatch:
    """What rollout, reward and credit hand to the update, with random advantages."""
    completions = [Completion(list(ids), [], "length") for _, ids in group.rows]
    rollout = RolloutBatch(
        group_size, group.problems, [prompt for prompt, _ in group.rows], completions,
        [module.task.parse(completion.ids) for completion in completions],
    )  # fmt: skip
    rollout.log_probs = module.row_log_probs(module.policy, group.rows)
    advantages_N = torch.randn(len(rollout), generator=torch.Generator().manual_seed(0))
    rollout.advantages_NT = advantages_N[:, None].expand(-1, max(rollout.lengths))
    return rollout


@contextlib.contextmanager
def endless(tokenizer: Any) -> Iterator[int]:
    """Let `HFRollout` run to its last token; gives the id that now stands for an end of turn."""
    beyond = len(tokenizer) + 1000  # no token
    with mock.patch("rlt.sampling.hf.turn_end_ids", return_value={beyond}):
        yield beyond


# --- modules --------------------------------------------------------------------------------------


def teacher_rl(work: Work, steps: int) -> RL:
    """The module of `stage=teacher_rl`, put together as the stage does."""
    cfg, model = work.cfg, LanguageModel(work.model, work.tokenizer)
    stage: TeacherRL = build_stage(cfg)
    algorithm, rollout = stage.algorithm, stage.rollout
    reference, student = stage.frozen_models(model)
    scorer = RewardScorer(
        build(cfg.reward), student, work.renderer, temperature=rollout.temperature or 1.0,
        token_budget=cfg.hardware.tokens_per_micro_batch,
    )  # fmt: skip
    module: RL = build(
        cfg.module, policy=work.model, renderer=work.renderer, reference=reference,
        task=Teaching(work.renderer, scorer), rollout=rollout, algorithm=algorithm,
        optim=build_partial(cfg.optim), schedule=build_partial(cfg.schedule),
        optimizer_steps=steps,
        tokens_per_micro_batch=cfg.hardware.tokens_per_micro_batch,
        gradient_checkpointing=cfg.hardware.gradient_checkpointing,
    )  # fmt: skip
    return module


def sft(work: Work, steps: int) -> SFT:
    """The module of `stage=teacher_sft`."""
    cfg = work.cfg
    module: SFT = build(
        cfg.module, policy=work.model, renderer=work.renderer, optim=build_partial(cfg.optim),
        schedule=build_partial(cfg.schedule), optimizer_steps=steps,
        tokens_per_micro_batch=cfg.hardware.tokens_per_micro_batch,
        gradient_checkpointing=cfg.hardware.gradient_checkpointing,
    )  # fmt: skip
    return module


def fit(work: Work, module: Any, items: Sequence[Any], steps: int, callbacks: Any = ()) -> None:
    """Train on all items at each step, with the config's trainer and nothing written."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(
            work.cfg.trainer, limit_val_batches=0, val_check_interval=1.0, logger=False,
            enable_progress_bar=False, default_root_dir=folder, callbacks=list(callbacks),
        )  # fmt: skip
        trainer.fit(module, datamodule=StepDataModule(items, [], len(items), steps, None, 0))


def inside_fit(work: Work, module: Any, run: Callable[[], None]) -> None:
    """Call `run` once, in place of a training step, where optimizers and trainer are at hand."""

    def training_step(*_: Any) -> None:
        run()

    with mock.patch.object(type(module), "training_step", training_step):
        fit(work, module, [None], 1)


class StepClock(L.Callback):
    """Seconds of each training step, and of the phases that the module logs."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock once the device has finished its earlier work."""
        wait()
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Record the seconds of the step and of its phases once the device is done."""
        wait()
        seconds = time.perf_counter() - self.started
        found = {
            name.removeprefix("time/train_").removesuffix("_seconds"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("time/train_") and name.endswith("_seconds")
        }
        self.steps.append({"seconds": seconds, **found})
