"""`rlt stage=student_rl`: a student learns by RL to answer right; a verifier is its reward.

What teaching is compared with, and what may come after it: the paper starts such RL from students
that a teacher has taught (its "cold start").
"""

import copy

from omegaconf import DictConfig

from rlt.config.build import build
from rlt.data.dataset import ProblemData
from rlt.data.problem import Problem
from rlt.data.renderer import Renderer
from rlt.llm.models import context_tokens, freeze
from rlt.runs.folder import RunFolder
from rlt.stages.common import load_data, load_model, load_renderer
from rlt.stages.rl import fit_rl, record_weights
from rlt.training import Answering
from rlt.training.algorithms import Algorithm


def run(cfg: DictConfig, run: RunFolder) -> dict[str, float]:
    renderer = load_renderer(cfg, "student")
    algorithm: Algorithm = build(cfg.algorithm)
    data: ProblemData = build(cfg.data)
    task = Answering(renderer, data.grader, cfg.missing_answer_penalty)
    split = load_data(data, renderer)
    run.record(data=split.report)
    rollout = build(cfg.rollout)
    datamodule = build(
        cfg.datamodule, train=split.train, validation=split.validation, seed=cfg.seed
    )
    student = load_model(cfg, "student")
    problems = split.train + split.validation
    check_context(context_tokens(student.model), renderer, problems, rollout.max_new_tokens)
    reference = freeze(copy.deepcopy(student.model)) if algorithm.needs_reference else None
    record_weights(run, {"student": student.model, "reference": reference})
    with data.grader:
        return fit_rl(
            cfg, run, renderer, student, reference, task, rollout, algorithm, data, datamodule
        )


def check_context(
    context: int, renderer: Renderer, problems: list[Problem], new_tokens: int
) -> None:
    """Raises ValueError when prompt and answer may outgrow the student's context."""
    for problem in problems:
        needed = len(renderer.student_prompt(problem)) + new_tokens
        if needed > context:
            raise ValueError(
                f"problem {problem.id} with an answer of {new_tokens} tokens needs "
                f"{needed} tokens, the student's context holds {context}; "
                "lower rollout.max_new_tokens or data.max_tokens"
            )
