"""`rlt stage=collect`: the teacher explains every training problem; the best of n become traces.

A trace that a student cannot learn from is left out: one whose text, seen by the student, is longer
than its context, and one in which the teacher wrote a tag of its own (a row with a tag inside would
be refused as training data). Both shares are reported.
"""

from typing import Any

from omegaconf import DictConfig

from rlt.data.records import Problem
from rlt.logprobs import row_log_probs
from rlt.models import context_tokens, fingerprint, freeze
from rlt.rewards import RewardScorer, ScoredExplanation
from rlt.runtime import RunFolder, build, peak_memory_bytes
from rlt.stages.common import (
    device_of,
    in_batches,
    load_data,
    load_model,
    load_views,
    log_scalars,
    require_same_tokenizer,
    source_of,
)
from rlt.traces import FORMATS, write_traces


def run(cfg: DictConfig, run: RunFolder) -> dict[str, float]:
    if cfg.best_of < 1:
        raise ValueError(f"best_of={cfg.best_of} must be at least 1")
    if cfg.format not in FORMATS:
        raise ValueError(f"format={cfg.format!r}: choose {' or '.join(FORMATS)}")
    views = load_views(cfg, "teacher")
    require_same_tokenizer(views.tokenizer, source_of(cfg, "student").tokenizer())
    data = build(cfg.data)
    split = load_data(data, views)
    rollout = build(cfg.rollout)
    device = device_of(cfg)
    teacher = freeze(load_model(cfg, "teacher").model).to(device)
    student = freeze(load_model(cfg, "student").model).to(device)
    scorer = RewardScorer(
        build(cfg.reward),
        student,
        views,
        temperature=rollout.temperature or 1.0,
        token_budget=cfg.hardware.tokens_per_micro_batch,
        grader=data.grader,
    )
    provenance = {
        "teacher": fingerprint(teacher),
        "student": fingerprint(student),
        "config": run.key,
        "seed": cfg.seed,
        "sampling": {"best_of": cfg.best_of, **{str(k): v for k, v in cfg.rollout.items()}},
    }
    run.record(data=split.report, models={k: provenance[k] for k in ("teacher", "student")})

    def explain(problems: list[Problem]) -> list[dict[str, Any]]:
        prompts = [views.teacher_prompt(problem) for problem in problems]
        groups = rollout.sample(teacher, views.tokenizer, prompts, cfg.best_of, views.stop)
        owners = [p for p, group in enumerate(groups) for _ in group]
        completions = [c for group in groups for c in group]
        log_probs = row_log_probs(
            teacher,
            [(prompts[p], c.ids) for p, c in zip(owners, completions, strict=True)],
            temperature=scorer.temperature,
            pad_id=views.tokenizer.pad_token_id,
            token_budget=cfg.hardware.tokens_per_micro_batch,
        )
        scored = [
            ScoredExplanation(problems[p], views.explanation(c.ids), prompts[p], values)
            for p, c, values in zip(owners, completions, log_probs, strict=True)
        ]
        table = scorer(scored, teacher=teacher)
        rows = []
        for p, problem in enumerate(problems):
            mine = range(p * cfg.best_of, (p + 1) * cfg.best_of)
            best = max(mine, key=lambda n: table.rewards[n])
            explanation = scored[best].explanation
            text = views.student_text(problem, explanation.ids)
            rows.append(
                {
                    "problem_id": problem.id,
                    "question": problem.question,
                    "solution": problem.solution,
                    "explanation": explanation.text,
                    "system": problem.system,
                    "finish": completions[best].finish,
                    "end_tag_found": explanation.end_tag_found,
                    "teacher_tokens": len(completions[best].ids),
                    "student_tokens": len(text.prompt) + len(text.continuation),
                    "reward": table.rewards[best],
                    "reward_terms": {name: v[best] for name, v in table.terms.items()},
                    "reward_mean_of_n": sum(table.rewards[n] for n in mine) / cfg.best_of,
                    **provenance,
                }
            )
        return rows

    problems = split.train[: cfg.max_problems]
    rows = in_batches(
        problems, cfg.problems_per_batch, run.folder / "traces.partial", cfg.seed, "collecting",
        explain,
    )  # fmt: skip
    limit = cfg.max_student_tokens or context_tokens(student)
    fitting = [row for row in rows if row["student_tokens"] <= limit]
    kept = [r for r in fitting if not any(tag in r["explanation"] for tag in views.forbidden)]
    if not kept:
        raise ValueError(
            f"no trace is left of {len(rows)}: {len(rows) - len(fitting)} are longer than {limit} "
            f"tokens (raise max_student_tokens or lower rollout.max_new_tokens), {len(fitting)} "
            "have a tag inside the explanation (train the teacher for longer)"
        )
    write_traces(kept, run.folder, cfg.format)
    (run.folder / "traces.partial").unlink()
    metrics = summarise(rows, fitting, kept)
    log_scalars(cfg, run.folder, metrics)
    return metrics | {"resources/peak_memory_bytes": float(peak_memory_bytes())}


def summarise(
    rows: list[dict[str, Any]], fitting: list[dict[str, Any]], kept: list[dict[str, Any]]
) -> dict[str, float]:
    """Means over the traces that were kept, and the shares of all that were not.

    Args:
        fitting: those of `rows` that the student's context holds; `kept` have no tag inside either.
    """
    metrics = {
        "collect/traces": float(len(kept)),
        "collect/cut_share": 1 - len(fitting) / len(rows),
        "collect/tag_inside_share": (len(fitting) - len(kept)) / len(rows),
        "collect/reward_mean_of_n": sum(row["reward_mean_of_n"] for row in rows) / len(rows),
    }
    for name in ("reward", "teacher_tokens", "student_tokens"):
        metrics[f"collect/{name}"] = sum(row[name] for row in kept) / len(kept)
    metrics["collect/end_tag_share"] = sum(row["end_tag_found"] for row in kept) / len(kept)
    for name in kept[0]["reward_terms"]:
        total = sum(row["reward_terms"][name] for row in kept)
        metrics[f"collect/reward_terms/{name}"] = total / len(kept)
    return metrics
