"""`rlt stage=score`: any explanations, scored by any reward and student, without RL.

    rlt stage=score traces=outputs/traces/traces model@student=… model@teacher=…
    rlt stage=score data=gsm_symbolic reward=solution_only model@student=smollm2_135m

Explanations come from traces, or from a data set's own. r_KL compares the student with a teacher,
so rewards that hold it need `model@teacher`; with its own weights, if the teacher that wrote the
text is at hand. The best `keep_fraction` is written as traces that `stage=distill` takes.

How well the reward tells good explanations from bad is told, too (`rlt.rewards.preflight`): of the
data's own, against damaged copies; of traces beside `data=…`, by its classifier and its grader.
"""

import dataclasses
from typing import Any

from omegaconf import DictConfig

from rlt.config.build import build
from rlt.data.dataset import ProblemData
from rlt.data.problem import Problem
from rlt.data.renderer import Renderer
from rlt.data.traces import trace_source, write_rows, write_traces
from rlt.evaluation.statistics import bootstrap_interval
from rlt.llm.device import device_of
from rlt.llm.models import context_tokens, fingerprint, freeze
from rlt.report.run import best_and_worst_of
from rlt.report.samples import log_attributions
from rlt.rewards import RewardScorer, RewardTable, ScoredExplanation
from rlt.rewards.attribution import attribution
from rlt.rewards.preflight import Area, Preflight, areas, signed_columns
from rlt.runs.environment import peak_memory_bytes
from rlt.runs.folder import RunFolder
from rlt.stages.common import (
    in_batches,
    load_data,
    load_model,
    load_renderer,
    log_scalars,
    make_logger,
    require_same_tokenizer,
    source_of,
)
from rlt.stages.examples import require_explanations
from rlt.stages.preflight import (
    own_labels,
    preflight_areas,
    scored_explanations,
    student_tokens,
    tell_areas,
)

_MOST_LABELLED = 2000  # traces whose labels are looked at


def run(cfg: DictConfig, run: RunFolder) -> dict[str, float]:
    check_score(cfg)
    renderer = load_renderer(cfg, "student")
    if cfg.teacher is not None:
        require_same_tokenizer(source_of(cfg, "teacher").tokenizer(), renderer.tokenizer)
    data = explained(cfg)
    split = load_data(data, renderer)
    run.record(data=split.report)
    problems = split.train + split.validation
    require_explanations(problems)
    problems = [problem for problem in problems if problem.explanation is not None]
    device = device_of(cfg)
    student = freeze(load_model(cfg, "student").model).to(device)
    teacher = None
    if cfg.teacher is not None:
        teacher = freeze(load_model(cfg, "teacher").model).to(device)
    models = {"student": student, "teacher": teacher}
    prints = {role: fingerprint(model) for role, model in models.items() if model is not None}
    run.record(models=prints)
    scorer = RewardScorer(
        build(cfg.reward), student, renderer,
        temperature=cfg.temperature, token_budget=cfg.hardware.tokens_per_micro_batch,
        grader=data.grader,
    )  # fmt: skip
    for problem in problems:
        check_context(renderer, problem, student)

    def score(batch: list[Problem]) -> list[dict[str, Any]]:
        scored = with_teacher(scored_explanations(batch, renderer), teacher, scorer)
        table = scorer(scored, teacher)
        return [
            {
                "problem_id": one.problem.id,
                "question": one.problem.question,
                "solution": one.problem.solution,
                "explanation": one.explanation.text,
                "system": one.problem.system,
                "student_tokens": student_tokens(renderer, one.problem),
                "reward": table.rewards[n],
                "reward_terms": {name: column[n] for name, column in table.terms.items()},
                "attribution": attribution(
                    renderer, one.problem, one.explanation.ids, table.scores[n]
                ),
                **prints,
                "config": run.key,
            }
            for n, one in enumerate(scored)
        ]

    partial = run.folder / "scores.partial"
    rows = in_batches(problems, cfg.rows_per_batch, partial, cfg.seed, "scoring", score)
    preflight: Preflight | None = build(cfg.preflight) if cfg.preflight is not None else None
    areas_found: list[Area] = []
    if preflight is not None:
        areas_found = find_areas(cfg, preflight, problems, rows, data, scorer)
    rows.sort(key=lambda row: -row["reward"])
    for rank, row in enumerate(rows, start=1):
        row["rank"] = rank
    write_rows(rows, run.folder / "scores.jsonl")
    kept = rows[: max(1, round(cfg.keep_fraction * len(rows)))]
    bare = [{k: v for k, v in row.items() if k != "attribution"} for row in kept]
    write_traces(bare, run.folder, cfg.format)
    partial.unlink()
    metrics = summarise(rows, kept)
    if preflight is not None:
        metrics |= tell_areas(areas_found, preflight, run.folder)
    log_scalars(cfg, run.folder, metrics)
    log_attributions(make_logger(cfg, run.folder), best_and_worst_of(rows, cfg.attributed))
    return metrics | {"resources/peak_memory_bytes": float(peak_memory_bytes())}


def find_areas(
    cfg: DictConfig,
    preflight: Preflight,
    problems: list[Problem],
    rows: list[dict[str, Any]],
    data: ProblemData,
    scorer: RewardScorer,
) -> list[Area]:
    """How well the reward tells the explanations apart: traces by their labels, as they were
    rewarded; the data's own by labels and against damaged copies.
    """
    if cfg.traces is None:
        return preflight_areas(preflight, problems, data, scorer, cfg.seed)
    problems, rows = problems[:_MOST_LABELLED], rows[:_MOST_LABELLED]
    terms = {name: [row["reward_terms"][name] for row in rows] for name in rows[0]["reward_terms"]}
    columns = signed_columns(scorer.reward, RewardTable([row["reward"] for row in rows], terms))
    known = {} if cfg.data is None or data.grader is None else problems_by_id(cfg, scorer.renderer)
    asked = [
        dataclasses.replace(known.get(one.id, one), explanation=one.explanation) for one in problems
    ]
    labels = own_labels(asked, data)
    if "verifier" in labels:  # of a problem that the data does not have, nothing is known
        verdicts = zip(problems, labels["verifier"], strict=True)
        labels["verifier"] = [mark if one.id in known else None for one, mark in verdicts]
    return areas(columns, labels, [problem.id for problem in problems])


def check_score(cfg: DictConfig) -> None:
    """Raises ValueError when explanations, models and reward do not go together."""
    if cfg.traces is None and cfg.data is None:
        raise ValueError(
            "stage=score takes explanations from traces=<file or run>/traces, or from data=… that "
            "carries them: give one of the two (neither is set)"
        )
    needs = build(cfg.reward).needs
    if "correct_rate" in needs and cfg.data is None:
        raise ValueError(
            "this reward verifies answers, and traces name no grader: give the data=… that they "
            "are of, too, whose grader is then taken"
        )
    if needs & {"teacher_log_probs", "exact_kl"} and cfg.teacher is None:
        raise ValueError(
            "this reward compares the student with the teacher that wrote the text: set "
            "model@teacher=… (and teacher_path=…), or choose reward=solution_only or no_entropy"
        )
    if cfg.teacher is None and cfg.teacher_path is not None:
        raise ValueError(f"teacher_path={cfg.teacher_path} needs model@teacher=…")


def explained(cfg: DictConfig) -> ProblemData:
    """The explanations to score; of traces, several may be of one problem.

    Beside traces, `data` gives the grader and the classifier of behaviours alone.
    """
    data: ProblemData | None = build(cfg.data) if cfg.data is not None else None
    if cfg.traces is None:
        assert data is not None
        return data
    return ProblemData(
        trace_source(cfg.traces),
        validation_fraction=0,
        unique=False,
        grader=None if data is None else data.grader,
        behaviour=None if data is None else data.behaviour,
    )


def problems_by_id(cfg: DictConfig, renderer: Renderer) -> dict[str, Problem]:
    """The data's problems, with what its verifier knows of them, which traces do not carry."""
    source = build(cfg.data).source
    split = ProblemData(source, on_bad_row="skip", validation_fraction=0).load(renderer.forbidden)
    return {problem.id: problem for problem in split.train}


def check_context(renderer: Renderer, problem: Problem, student: Any) -> None:
    """Raises ValueError when a student's text is longer than its context."""
    tokens = student_tokens(renderer, problem)
    if tokens > context_tokens(student):
        raise ValueError(
            f"problem {problem.id}: question, explanation and solution are {tokens} tokens, the "
            f"student's context holds {context_tokens(student)}; leave such rows out with "
            "data.max_tokens and data.on_bad_row=skip"
        )


def with_teacher(
    scored: list[ScoredExplanation], teacher: Any, scorer: RewardScorer
) -> list[ScoredExplanation]:
    """The same with the log-probs that a teacher gives them; unchanged without a teacher."""
    if teacher is None:
        return scored
    rows = [(one.teacher_prompt, one.explanation.ids) for one in scored]
    log_probs = scorer.row_log_probs(teacher, rows)
    return [
        dataclasses.replace(one, teacher_log_probs_T=values)
        for one, values in zip(scored, log_probs, strict=True)
    ]


def summarise(rows: list[dict[str, Any]], kept: list[dict[str, Any]]) -> dict[str, float]:
    interval = bootstrap_interval([row["reward"] for row in rows])
    metrics = {
        "score/rows": float(len(rows)),
        "score/kept": float(len(kept)),
        "score/reward": interval.mean,
        "score/reward_low": interval.low,
        "score/reward_high": interval.high,
        "score/kept_reward": sum(row["reward"] for row in kept) / len(kept),
    }
    for name in rows[0]["reward_terms"]:
        total = sum(row["reward_terms"][name] for row in rows)
        metrics[f"score/reward_terms/{name}"] = total / len(rows)
    return metrics
