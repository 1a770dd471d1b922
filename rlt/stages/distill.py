"""`rlt stage=distill`: a student learns from traces, from the data's own explanations, or from
solutions alone. Held out: some of the traces for the loss, some of the questions for accuracy.
"""

import logging
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig

from rlt.config.build import build
from rlt.data.dataset import ProblemData, split_problems
from rlt.data.problem import Problem
from rlt.data.renderer import Renderer
from rlt.data.traces import trace_source
from rlt.evaluation.answers import extract_answer
from rlt.runs.folder import RunFolder
from rlt.stages.common import fit_sft, load_data, load_renderer
from rlt.stages.examples import require_explanations, student_examples

log = logging.getLogger(__name__)

EXPLANATIONS = ("traces", "data", "none")


def run(cfg: DictConfig, run: RunFolder) -> dict[str, float]:
    check_explanations(cfg)
    renderer = load_renderer(cfg, "student")
    data: ProblemData = build(cfg.data)
    split = load_data(data, renderer)
    report: dict[str, Any] = {"data": split.report}
    train, validation = split.train, split.validation
    if cfg.explanations == "traces":
        traces = ProblemData(
            trace_source(cfg.traces), on_bad_row=data.on_bad_row, validation_fraction=0
        ).load(renderer.forbidden)
        # Traces are of training questions already: another split of them needs other numbers.
        train, validation = split_problems(traces.train, cfg.validation_fraction, "traces")
        counts = {"train": len(train), "validation": len(validation)}
        report["traces"] = traces.report | counts
        known = {problem.id for problem in split.train}
        if not any(problem.id in known for problem in traces.train):
            log.warning(
                "traces: none of their %d questions is among data's training problems; the "
                "accuracy while training is measured on data's held-out questions, so choose "
                "data=… as for collect, or validation_answers=0",
                len(traces.train),
            )
    bare = cfg.explanations == "none"
    run.record(**report)
    if not bare:
        require_explanations(train)
    train_examples = student_examples(train[: cfg.max_examples], renderer, bare)
    validation_examples = student_examples(validation, renderer, bare)
    questions = split.validation[: cfg.validation_answers]
    accuracy = answer_accuracy(cfg, renderer, data.grader, questions) if questions else None
    return fit_sft(cfg, run, "student", renderer, train_examples, validation_examples, accuracy)


def check_explanations(cfg: DictConfig) -> None:
    """Raises ValueError when `explanations` and `traces` contradict each other."""
    if cfg.explanations not in EXPLANATIONS:
        raise ValueError(f"explanations={cfg.explanations!r}: choose {', '.join(EXPLANATIONS)}")
    if cfg.explanations == "traces" and cfg.traces is None:
        raise ValueError(
            "stage=distill needs traces=<run>/traces; or explanations=data for the data's own, or "
            "explanations=none for solutions alone"
        )
    if cfg.explanations != "traces" and cfg.traces is not None:
        raise ValueError(
            f"traces={cfg.traces} would not be read with explanations={cfg.explanations}; leave "
            "one of them out"
        )


def answer_accuracy(
    cfg: DictConfig, renderer: Renderer, grader: Any, questions: list[Problem]
) -> Callable[[Any], float]:
    """A function of the student: the share of held-out questions it answers right."""
    rollout = build(cfg.rollout)
    tags = renderer.style.tags["solution_open"], renderer.style.tags["solution_close"]

    def accuracy(student: Any) -> float:
        prompts = [renderer.student_prompt(problem) for problem in questions]
        groups = rollout.sample(student, renderer.tokenizer, prompts, 1, tags[1])
        answers = [extract_answer(renderer.decode(group[0].ids), *tags) for group in groups]
        verdicts = grader.grade_all(
            [(p, a) for p, a in zip(questions, answers, strict=True) if a is not None]
        )
        return sum(v.correct for v in verdicts) / len(questions)

    return accuracy
