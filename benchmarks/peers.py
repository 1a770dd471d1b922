"""What one would use instead: the published way to reward, and trl's trainers.

The reward is scored as the paper's code scores it: completion by completion, one forward of the
student over its whole text and one of the teacher over its own, logits and log-softmax over the
whole vocabulary at every position, prompt included. It is written here in plain torch, from ids:
what the published code spends on text and on searching spans is left out, in its favour.

trl runs with the settings of the config, in float32 without gradient checkpointing, as rlt does.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from benchmarks.common import wait
from benchmarks.work import Work, problems_of
from rlt.data.problem import Problem
from rlt.data.renderer import Renderer
from rlt.llm.models import save_model
from rlt.training import Example


@torch.no_grad()
def full_log_probs(model: Any, ids: Sequence[int], temperature: float) -> Tensor:
    """Log-probs of every token of one text but the first, from the logits of all its places."""
    ids_1T = torch.tensor([list(ids)], device=model.device)
    logits_TV = model(input_ids=ids_1T).logits[0, :-1]
    log_probs_TV = torch.nn.functional.log_softmax(logits_TV / temperature, dim=-1)
    return log_probs_TV.gather(-1, ids_1T[0, 1:, None])[:, 0].float()


def one_by_one_rewards(
    teacher: Any,
    student: Any,
    renderer: Renderer,
    problems: Sequence[Problem],
    completions: Sequence[Sequence[int]],
    temperature: float,
) -> list[float]:
    """The paper's reward of each completion: λ = 3, α = 0.01, 1 less without an end tag."""
    rewards = []
    for problem, completion in zip(problems, completions, strict=True):
        explanation = renderer.explanation(completion)
        text = renderer.student_text(problem, explanation.ids)
        found = full_log_probs(student, text.prompt + text.continuation, temperature)
        student_C = found[len(text.prompt) - 1 :]
        prompt = renderer.teacher_prompt(problem)
        found = full_log_probs(teacher, prompt + explanation.ids, temperature)
        solution_K = student_C[slice(*text.solution_span)]
        kl_T = found[len(prompt) - 1 :] - student_C[slice(*text.thought_span)]
        reward = solution_K.mean() + 0.01 * solution_K.min() - 3 * (kl_T.mean() + 0.01 * kl_T.max())
        rewards.append(float(reward) - (0.0 if explanation.end_tag_found else 1.0))
    return rewards


def _shared_options(work: Work, folder: str, steps: int, rows: int) -> dict[str, Any]:
    """Settings of transformers' Trainer that say what rlt's config says."""
    cfg = work.cfg
    return {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": rows,
        "learning_rate": cfg.optim.lr,
        "adam_beta1": cfg.optim.betas[0],
        "adam_beta2": cfg.optim.betas[1],
        "weight_decay": cfg.optim.weight_decay,
        "max_grad_norm": cfg.module.max_grad_norm,
        "lr_scheduler_type": "constant",
        "bf16": "bf16" in str(cfg.hardware.precision),
        "gradient_checkpointing": cfg.hardware.gradient_checkpointing,
        "use_cpu": work.device.type == "cpu",
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _hand_over(work: Work, folder: str) -> dict[str, Any]:
    """Save the model for trl, which loads it itself; gives what it is to be loaded with."""
    save_model(work.model, work.tokenizer, Path(folder))
    dtype = str(work.model.dtype).removeprefix("torch.")
    work.model = None
    return {"dtype": dtype, "attn_implementation": work.cfg.hardware.attention}


def step_clock() -> tuple[Any, list[float]]:
    """A callback of transformers' Trainer, and the seconds of each step that it notes."""
    from transformers import TrainerCallback

    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wait()
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            wait()
            seconds.append(time.perf_counter() - self.started)

    return Clock(), seconds


def grpo_steps(
    work: Work, questions: int, completions: int, prompt_tokens: int, new_tokens: int, steps: int
) -> list[dict[str, float]]:
    """Seconds of each GRPOTrainer step with the published reward, and of its phases.

    Prompts are handed over as ids, and no end of turn is sampled before the last token. The
    reward's student is the reference model.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    cfg, renderer = work.cfg, work.renderer
    problems = {p.question: p for p in problems_of(renderer, questions, prompt_tokens)}
    rewarded: list[float] = []
    sampled: list[float] = []
    clock, seconds = step_clock()
    adapter = _lora_of(cfg)

    def published_reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> Any:
        if {len(ids) for ids in completion_ids} != {new_tokens}:
            raise AssertionError("completions differ in length: the arms' work is not the same")
        student = trainer.ref_model if adapter is None else _WithoutAdapter(trainer.model)
        return one_by_one_rewards(
            trainer.model, student, renderer, [problems[q] for q in prompts],
            completion_ids, cfg.rollout.temperature,
        )  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        options = _shared_options(work, folder, steps, questions * completions)
        loading = _hand_over(work, folder)
        trainer = GRPOTrainer(
            model=folder,
            reward_funcs=published_reward,
            args=GRPOConfig(
                **options,
                model_init_kwargs=loading,
                num_generations=completions,
                max_completion_length=new_tokens,
                generation_kwargs={"min_new_tokens": new_tokens},
                temperature=cfg.rollout.temperature,
                beta=cfg.algorithm.beta,
                epsilon=cfg.algorithm.epsilon_low,
                loss_type="grpo",
                shuffle_dataset=False,
            ),
            train_dataset=Dataset.from_dict({"prompt": list(problems)}),
            processing_class=work.tokenizer,
            callbacks=[clock],
            peft_config=adapter,
        )
        ids = {question: renderer.teacher_prompt(p) for question, p in problems.items()}
        trainer._tokenize_prompts = lambda prompts: ([ids[q] for q in prompts], None, {})
        trainer._generate_single_turn = _noting(trainer._generate_single_turn, sampled)
        trainer._calculate_rewards = _noting(trainer._calculate_rewards, rewarded)
        trainer.train()
    return [
        {"seconds": s, "rollout": g, "reward": r, "update": s - g - r}
        for s, g, r in zip(seconds, sampled, rewarded, strict=True)
    ]


def _lora_of(cfg: DictConfig) -> Any:
    """The config's adapter as peft's own config; None where all weights are trained."""
    from peft import LoraConfig

    node = cfg.adapter
    if "rank" not in node:
        return None
    return LoraConfig(
        r=node.rank, lora_alpha=node.alpha, lora_dropout=node.dropout,
        target_modules=node.targets, use_rslora=node.rslora, task_type="CAUSAL_LM",
    )  # fmt: skip


class _WithoutAdapter:
    """A PeftModel as its base model: trl keeps no reference of its own beside an adapter."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = model.device

    def __call__(self, **inputs: Any) -> Any:
        with self.model.disable_adapter():
            return self.model(**inputs)


def _noting(run: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        wait()
        started = time.perf_counter()
        found = run(*args, **kwargs)
        wait()
        seconds.append(time.perf_counter() - started)
        return found

    return timed


def sft_steps(work: Work, examples: Sequence[Example], steps: int) -> list[float]:
    """Seconds of each SFTTrainer step on the same rows, with loss on the targets alone."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    columns = {
        "input_ids": [e.prompt + e.target for e in examples],
        "labels": [[-100] * len(e.prompt) + e.target for e in examples],
    }
    clock, seconds = step_clock()
    with tempfile.TemporaryDirectory() as folder:
        options = _shared_options(work, folder, steps, len(examples))
        loading = _hand_over(work, folder)
        trainer = SFTTrainer(
            model=folder,
            args=SFTConfig(**options, model_init_kwargs=loading, max_length=None),
            train_dataset=Dataset.from_dict(columns),
            processing_class=work.tokenizer,
            callbacks=[clock],
            peft_config=_lora_of(work.cfg),
        )
        trainer.train()
    return seconds
