"""`rlt stage=collect`: the teacher explains every training problem; the best of n become traces.

With `sees_solution=false` the teacher is asked as a student is, without the solution, and writes
thought and answer; kept are thoughts whose answer the data's grader calls right. That is what an
able student can teach by itself, the control that tells what a teacher is for.

Left out are explanations that a student cannot learn from: longer, as the student sees them, than
its context; with a tag inside, which would be refused as training data; never closed, unless
`keep_unclosed`; with a wrong answer, if `sees_solution=false`. The best of n (or the one of another
`rank`) is sought among the others, and the shares of problems without any are reported.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from rlt.config.build import build
from rlt.data.dataset import ProblemData, behaviour_rates
from rlt.data.problem import Problem
from rlt.data.renderer import Explanation
from rlt.data.traces import write_traces
from rlt.evaluation.answers import extract_answer
from rlt.llm.device import device_of
from rlt.llm.models import context_tokens, fingerprint, freeze
from rlt.rewards import RewardScorer, ScoredExplanation
from rlt.runs.environment import peak_memory_bytes
from rlt.runs.folder import RunFolder
from rlt.sampling import known_log_probs
from rlt.stages.common import (
    in_batches,
    load_data,
    load_model,
    load_renderer,
    log_scalars,
    require_same_tokenizer,
    source_of,
)

REASONS = ("cut", "tag_inside", "unclosed")  # why a problem may be left without a trace


def run(cfg: DictConfig, run: RunFolder) -> dict[str, float]:
    renderer = load_renderer(cfg, "teacher")
    require_same_tokenizer(renderer.tokenizer, source_of(cfg, "student").tokenizer())
    data: ProblemData = build(cfg.data)
    split = load_data(data, renderer)
    rollout = build(cfg.rollout)
    if not cfg.sees_solution:
        require_grader(data.grader)
    device = device_of(cfg)
    teacher = freeze(load_model(cfg, "teacher").model).to(device)
    student = freeze(load_model(cfg, "student").model).to(device)
    scorer = RewardScorer(
        build(cfg.reward),
        student,
        renderer,
        temperature=rollout.temperature or 1.0,
        token_budget=cfg.hardware.tokens_per_micro_batch,
        grader=data.grader,
    )
    provenance = {
        "teacher": fingerprint(teacher),
        "student": fingerprint(student),
        "config": run.key,
        "seed": cfg.seed,
        "sampling": {
            "best_of": cfg.best_of,
            "rank": cfg.rank,
            **{str(k): v for k, v in cfg.rollout.items()},
        },
    }
    run.record(data=split.report, models={k: provenance[k] for k in ("teacher", "student")})

    limit = min(cfg.max_student_tokens or 2**31, context_tokens(student))

    tags = renderer.style.tags
    solution_tags = tags["solution_open"], tags["solution_close"]

    def explain(problems: list[Problem]) -> list[dict[str, Any]]:
        if cfg.sees_solution:
            prompts = [renderer.teacher_prompt(problem) for problem in problems]
            stop, end_tag = renderer.stop, renderer.stop
        else:
            prompts = [renderer.student_prompt(problem) for problem in problems]
            stop, end_tag = tags["solution_close"], tags["thought_close"]
        groups = rollout.sample(teacher, renderer.tokenizer, prompts, cfg.best_of, stop)
        owners = [p for p, group in enumerate(groups) for _ in group]
        completions = [c for group in groups for c in group]
        log_probs = None
        if scorer.temperature == (rollout.temperature or 1.0):
            log_probs = known_log_probs(teacher, completions)
        if log_probs is None:
            log_probs = scorer.row_log_probs(
                teacher, [(prompts[p], c.ids) for p, c in zip(owners, completions, strict=True)]
            )
        scored = [
            ScoredExplanation(problems[p], renderer.explanation(c.ids, end_tag), prompts[p], values)
            for p, c, values in zip(owners, completions, log_probs, strict=True)
        ]
        table = scorer(scored, teacher=teacher)
        wrong = [False] * len(scored)
        if not cfg.sees_solution:
            texts = [renderer.decode(c.ids) for c in completions]
            answers = [extract_answer(text, *solution_tags) or "" for text in texts]
            owned = [problems[p] for p in owners]
            verdicts = data.grader.grade_all(list(zip(owned, answers, strict=True)))
            wrong = [not verdict.correct for verdict in verdicts]
        rows = []
        for n, row in enumerate(scored):
            text = renderer.student_text(row.problem, row.explanation.ids)
            tokens = len(text.prompt) + len(text.continuation)
            behaviour = data.behaviour and data.behaviour(
                row.problem.question,
                row.problem.solution,
                row.explanation.text,
                row.explanation.end_tag_found,
            )
            rows.append(
                {
                    "problem_id": row.problem.id,
                    "question": row.problem.question,
                    "solution": row.problem.solution,
                    "explanation": row.explanation.text,
                    "system": row.problem.system,
                    "finish": completions[n].finish,
                    "end_tag_found": row.explanation.end_tag_found,
                    "teacher_tokens": len(completions[n].ids),
                    "student_tokens": tokens,
                    "reward": table.rewards[n],
                    "reward_terms": {name: v[n] for name, v in table.terms.items()},
                    **({"behaviour": behaviour} if behaviour is not None else {}),
                    "left_out": why_left_out(row.explanation, tokens, wrong[n]),
                    **provenance,
                }
            )
        groups_of_rows = [rows[i : i + cfg.best_of] for i in range(0, len(rows), cfg.best_of)]
        return [ranked(group, cfg.rank) for group in groups_of_rows]

    def why_left_out(explanation: Explanation, student_tokens: int, wrong: bool) -> str | None:
        if student_tokens > limit:
            return "cut"
        if any(tag in explanation.text for tag in renderer.forbidden):
            return "tag_inside"
        if not explanation.end_tag_found and not cfg.keep_unclosed:
            return "unclosed"
        return "wrong" if wrong else None

    problems = split.train[: cfg.max_problems]
    rows = in_batches(
        problems, cfg.problems_per_batch, run.folder / "traces.partial", cfg.seed, "collecting",
        explain,
    )  # fmt: skip
    kept = [
        {key: value for key, value in row.items() if key != "left_out"}
        for row in rows
        if row["left_out"] is None
    ]
    if not kept:
        counts = Counter(row["left_out"] for row in rows)
        raise ValueError(
            f"no trace is left of {len(rows)}: {counts['cut']} are longer than {limit} tokens "
            "(raise max_student_tokens, up to the student's context, or lower "
            "rollout.max_new_tokens), "
            f"{counts['tag_inside']} have a tag inside the explanation, {counts['unclosed']} were "
            "never closed (train the teacher for longer, or set keep_unclosed=true), "
            f"{counts['wrong']} end in a wrong answer"
        )
    write_traces(kept, run.folder, cfg.format)
    (run.folder / "traces.partial").unlink()
    metrics = summarise(rows, kept, REASONS if cfg.sees_solution else (*REASONS, "wrong"))
    if data.behaviour is not None:
        shares = behaviour_rates([row["behaviour"] for row in kept], data.behaviour.names)
        metrics |= {f"collect/{name}": share for name, share in shares.items()}
    log_scalars(cfg, run.folder, metrics)
    return metrics | {"resources/peak_memory_bytes": float(peak_memory_bytes())}


def ranked(group: list[dict[str, Any]], rank: int) -> dict[str, Any]:
    """A problem's completion of that rank by reward, or the last of them if fewer are fit.

    Ranked are those fit to be a trace, if any are.
    """
    fit = [row for row in group if row["left_out"] is None] or group
    in_order = sorted(fit, key=lambda row: -float(row["reward"]))
    chosen = in_order[min(rank, len(in_order)) - 1]
    return chosen | {"reward_mean_of_n": sum(row["reward"] for row in group) / len(group)}


def require_grader(grader: Any) -> None:
    """Raises ValueError when answers are to be verified and there is nothing to verify them."""
    if grader is None:
        raise ValueError(
            "collect with sees_solution=false keeps explanations whose answer is right: set "
            "data.grader (it is null)"
        )


def summarise(
    rows: list[dict[str, Any]], kept: list[dict[str, Any]], reasons: Sequence[str]
) -> dict[str, float]:
    """Means over the traces that were kept, and the shares of problems left without one.

    Args:
        reasons: why a problem may be left without a trace.
    """
    metrics = {
        "collect/traces": float(len(kept)),
        "collect/reward_mean_of_n": sum(row["reward_mean_of_n"] for row in rows) / len(rows),
    }
    for reason in reasons:
        share = sum(row["left_out"] == reason for row in rows) / len(rows)
        metrics[f"collect/{reason}_rate"] = share
    for name in ("reward", "teacher_tokens", "student_tokens"):
        metrics[f"collect/{name}"] = sum(row[name] for row in kept) / len(kept)
    metrics["collect/end_tag_rate"] = sum(row["end_tag_found"] for row in kept) / len(kept)
    for name in kept[0]["reward_terms"]:
        total = sum(row["reward_terms"][name] for row in kept)
        metrics[f"collect/reward_terms/{name}"] = total / len(kept)
    return metrics
