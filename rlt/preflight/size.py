"""What a plan says of a stage's size: tokens, steps, memory; what does not fit is refused."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from rlt.data.batches import total_steps
from rlt.data.problem import Problem
from rlt.data.renderer import Renderer
from rlt.preflight.memory_estimate import (
    Lengths,
    Shape,
    gigabytes,
    lengths_of,
    machine_bytes,
    peak_bytes,
)
from rlt.stages.common import FIRST_LOOK, check_lengths
from rlt.stages.examples import student_examples, teacher_examples
from rlt.stages.student_rl import check_context as check_answer_context
from rlt.stages.teacher_rl import check_context as check_explanation_context
from rlt.training import Example


def steps_or_batches(cfg: DictConfig, train: int | None) -> int | None:
    """Steps of training, or batches, of the whole run; None if that is not known yet."""
    if cfg.get("datamodule") is not None:
        node = cfg.datamodule
        known = node.steps is not None or (train is not None and not reads_traces(cfg))
        return total_steps(train or 1, node.batch_size, node.steps, node.epochs) if known else None
    size = cfg.get("problems_per_batch", cfg.get("questions_per_batch", cfg.get("rows_per_batch")))
    items = train if cfg.get("max_problems") is None else min(train or 0, cfg.max_problems)
    return None if train is None or items is None else -(-items // size)


def reads_traces(cfg: DictConfig) -> bool:
    return bool(cfg.get("explanations") == "traces" or cfg.get("traces") is not None)


def measured_lengths(
    cfg: DictConfig,
    renderer: Renderer,
    problems: list[Problem],
    shapes: Mapping[str, Shape],
    parts: dict[str, Any],
) -> Lengths:
    """Tokens of prompts and targets; raises ValueError where the run would find them too long.

    Looked at are the longest problems by characters, and some others.
    """
    longest = sorted(problems, key=_characters, reverse=True)[:FIRST_LOOK]
    problems = longest[: FIRST_LOOK // 8] + problems[: FIRST_LOOK - FIRST_LOOK // 8]
    contexts = {role: shape.context for role, shape in shapes.items()}
    new_tokens = parts["rollout"].max_new_tokens if "rollout" in parts else 0
    if cfg.stage == "teacher_rl" and contexts:
        judged = {"student": contexts.get("student", contexts["teacher"])}
        check_explanation_context(
            contexts | judged, renderer, problems, parts["rollout"].max_new_tokens
        )
    if cfg.stage == "student_rl" and contexts:
        check_answer_context(contexts["student"], renderer, longest, new_tokens)
    if cfg.stage == "teacher_rl" or (cfg.stage == "collect" and cfg.sees_solution):
        return lengths_of((renderer.teacher_prompt(p), []) for p in problems)
    if cfg.stage in ("student_rl", "collect", "evaluate", "score") or reads_traces(cfg):
        return lengths_of((renderer.student_prompt(p), []) for p in problems)
    examples = _examples(cfg, renderer, longest)
    if contexts and examples:
        check_lengths(examples, next(iter(contexts.values())))
    return lengths_of((one.prompt, one.target) for one in _examples(cfg, renderer, problems))


def _examples(cfg: DictConfig, renderer: Renderer, problems: list[Problem]) -> list[Example]:
    if cfg.stage == "teacher_sft":
        return teacher_examples(problems, renderer)
    return student_examples(problems, renderer, cfg.get("explanations") == "none")


def _characters(problem: Problem) -> int:
    return sum(map(len, (problem.question, problem.solution, problem.explanation or "")))


def memory_in_words(
    cfg: DictConfig, shapes: Mapping[str, Shape], lengths: Lengths, parts: dict[str, Any]
) -> tuple[str, list[str]]:
    """The estimated peak in words, and a warning if the machine has less."""
    new_tokens = parts["rollout"].max_new_tokens if "rollout" in parts else 0
    prompt = max(lengths.prompts, default=0)
    phases = peak_bytes(cfg, shapes, lengths.longest + new_tokens, prompt, _reference(cfg, parts))
    phase = max(phases, key=lambda name: phases[name])
    told = "memory (estimated): " + ", ".join(f"{k} {gigabytes(v)}" for k, v in phases.items())
    there = machine_bytes(cfg)
    if there is None:
        return f"{told}; no such device here", []
    if phases[phase] <= there:
        return f"{told}, of {gigabytes(there)}", []
    return f"{told}, of {gigabytes(there)}", [
        f"the {phase} needs about {gigabytes(phases[phase])} and this machine has "
        f"{gigabytes(there)}: lower hardware.tokens_per_micro_batch or "
        "hardware.generation_token_budget, set hardware.gradient_checkpointing=true, or choose a "
        "smaller model"
    ]


def _reference(cfg: DictConfig, parts: dict[str, Any]) -> bool:
    return "algorithm" in parts and parts["algorithm"].needs_reference
