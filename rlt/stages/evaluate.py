"""`rlt stage=evaluate`: a student answers a benchmark's questions, k times each."""

import json
from typing import Any

from omegaconf import DictConfig

from rlt.config.build import build
from rlt.data.problem import Problem
from rlt.data.renderer import Renderer
from rlt.evaluation.benchmark import Benchmark, evaluate_answers
from rlt.llm.device import device_of, on_device
from rlt.llm.models import fingerprint, freeze
from rlt.runs.environment import peak_memory_bytes
from rlt.runs.folder import RunFolder
from rlt.stages.common import in_batches, load_model, load_renderer, log_scalars


def run(cfg: DictConfig, run: RunFolder) -> dict[str, float]:
    renderer = load_renderer(cfg, "student")
    benchmark: Benchmark = build(cfg.benchmark)
    problems = benchmark.load(renderer.style.forbidden, renderer.count_tokens)
    overlap = check_contamination(cfg, renderer, problems)
    rollout = build(cfg.rollout)
    student = on_device(freeze(load_model(cfg, "student").model), device_of(cfg))
    run.record(data=benchmark.report, models={"student": fingerprint(student)})
    tags = renderer.style.tags["solution_open"], renderer.style.tags["solution_close"]

    def prompt(problem: Problem) -> list[int]:
        return (
            renderer.student_prompt(problem)
            if cfg.thinking
            else renderer.answer_prompt(problem, [])
        )

    begun = "" if cfg.thinking else tags[0]  # of the answer, by the prompt

    def answer(questions: list[Problem]) -> list[dict[str, Any]]:
        prompts = [prompt(problem) for problem in questions]
        groups = rollout.sample(student, renderer.tokenizer, prompts, cfg.samples, tags[1])
        return [
            {
                "problem_id": problem.id,
                "texts": [begun + renderer.decode(c.ids) for c in group],
                "tokens": [len(c.ids) for c in group],
            }
            for problem, group in zip(questions, groups, strict=True)
        ]

    partial = run.folder / "answers.partial"
    rows = in_batches(problems, cfg.questions_per_batch, partial, cfg.seed, "answering", answer)
    with benchmark.grader:
        result = evaluate_answers(
            problems,
            [row["texts"] for row in rows],
            tags,
            benchmark.grader,
            [row["tokens"] for row in rows],
            [renderer.decode(prompt(problem)) for problem in problems],
        )
    with (run.folder / "answers.jsonl").open("w", encoding="utf-8") as file:
        for record in result.records:
            file.write(json.dumps(record.to_json(), ensure_ascii=False) + "\n")
    partial.unlink()
    metrics = result.metrics | overlap
    log_scalars(cfg, run.folder, metrics)
    return metrics | {"resources/peak_memory_bytes": float(peak_memory_bytes())}


def check_contamination(
    cfg: DictConfig, renderer: Renderer, problems: list[Problem]
) -> dict[str, float]:
    """Overlap of the questions with what the student was trained on, if the config says what.

    Raises:
        ValueError: it is above the config's limit.
    """
    if cfg.trained_on is None:
        return {}
    trained_on = build(cfg.trained_on).load(renderer.forbidden, renderer.count_tokens).train
    overlap: dict[str, float] = build(cfg.contamination).check(trained_on, problems)
    return overlap
