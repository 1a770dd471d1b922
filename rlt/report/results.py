"""A run's result in sentences, with the numbers that matter for its stage."""

import re
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from rlt.evaluation.statistics import Interval, paired_difference_interval
from rlt.report.folder import Run
from rlt.report.text import reward_terms
from rlt.runs.formatting import number, percent, signed


def result_lines(run: Run) -> list[str]:
    """Return sentences about the result of a run, the most important one first."""
    stage = run.stage_class
    lines = stage.result(run) if stage is not None else []
    return lines or ["This run wrote no metrics that say how it went."]


def accuracy_k(metrics: dict[str, float]) -> int | None:
    """Return the k of avg@k; None if nothing was evaluated."""
    found = (re.fullmatch(r"eval/avg@(\d+)", name) for name in metrics)
    return next((int(match[1]) for match in found if match), None)


def accuracy(metrics: dict[str, float], name: str) -> str:
    """Return a share with its interval, such as `45.0 % [41.2, 48.9]`; a dash if it is missing."""
    if name not in metrics:
        return "-"
    text = percent(metrics[name])
    if f"{name}_low" in metrics and f"{name}_high" in metrics:
        low, high = 100 * metrics[f"{name}_low"], 100 * metrics[f"{name}_high"]
        text += f" [{low:.1f}, {high:.1f}]"
    return text


def _change(metrics: dict[str, float], name: str, show: Callable[[float], str] = number) -> str:
    """Return a validation metric as `before → after`, or only the one that is known."""
    known = [metrics[key] for key in (f"start/{name}", name) if key in metrics]
    return " → ".join(show(value) for value in known)


def _ends(values: Sequence[tuple[int, float]]) -> tuple[float, float, int]:
    """Return the means of the first and last tenth of a curve, and the number of steps in each."""
    n = max(1, len(values) // 10)
    return fmean(v for _, v in values[:n]), fmean(v for _, v in values[-n:]), n


def _training_line(run: Run, name: str, what: str) -> list[str]:
    values = run.scalars.get(name, [])
    if len(values) < 2:
        return []
    first, last, n = _ends(values)
    which = "step" if n == 1 else f"{n} steps"
    return [
        f"Training {what}: {number(first)} → {number(last)} (first and last {which} "
        f"of {len(values)})."
    ]


def rl_result(run: Run, closed: str) -> list[str]:
    """Return sentences on the result of RL.

    Args:
        closed: the report's word for completions that have an end tag.
    """
    metrics, lines, interval = run.metrics, [], None
    after, before = metrics.get("validation/reward"), metrics.get("start/validation/reward")
    if after is not None and before is not None:
        interval = _held_out_change(run)
        within = f" [{signed(interval.low)}, {signed(interval.high)}]" if interval else ""
        lines.append(
            f"Held-out reward: {number(before)} → {number(after)} "
            f"({signed(after - before)}{within})."
        )
        changes = [
            f"{name.removeprefix('validation/reward_terms/')} {_change(metrics, name)}"
            for name in metrics
            if name.startswith("validation/reward_terms/")
        ]
        if changes:
            lines.append(f"By term, unweighted: {'; '.join(changes)}.")
    lines += _training_line(run, "train/reward", "reward")
    shape = [
        f"{what} {_change(metrics, f'validation/{name}', show)}"
        for name, what, show in (
            ("end_tag_rate", closed, percent),
            ("overlong_rate", "cut by length", percent),
            ("completion_tokens", "tokens per completion", number),
        )
        if f"validation/{name}" in metrics
    ]
    if shape:
        lines.append(f"Held-out completions: {'; '.join(shape)}.")
    if after is not None and before is not None:
        problems = len(next(iter(run.held_out_rewards.values()), {}))
        lines.append(
            f"In brackets: 95 % interval of the change, paired over {problems} held-out problems."
            if interval
            else "Before and after are one validation each, without an interval: small changes "
            "may be sampling noise."
        )
    return lines


def _held_out_change(run: Run) -> Interval | None:
    """Return last minus first held-out reward, paired by problem; None below two problems."""
    steps = run.held_out_rewards
    if len(steps) < 2:
        return None
    first, last = steps[min(steps)], steps[max(steps)]
    both = sorted(first.keys() & last.keys())
    if len(both) < 2:
        return None
    return paired_difference_interval([last[p] for p in both], [first[p] for p in both])


def sft_result(run: Run) -> list[str]:
    """Return sentences on the result of fine-tuning."""
    metrics, lines = run.metrics, []
    parts = []
    if "validation/loss" in metrics:
        parts.append(f"loss {_change(metrics, 'validation/loss')} nats per target token")
    if "validation/answer_accuracy" in metrics:
        parts.append(f"answer accuracy {_change(metrics, 'validation/answer_accuracy', percent)}")
    if parts:
        lines.append(f"Held-out {'; '.join(parts)}.")
    return lines + _training_line(run, "train/loss", "loss in nats per target token")


def collect_result(run: Run) -> list[str]:
    """Return sentences on the result of collecting traces."""
    metrics, traces = run.metrics, run.traces
    rewards = [float(row["reward"]) for row in traces if row.get("reward") is not None]
    best_of, rank = run.config.get("best_of") or 1, run.config.get("rank") or 1
    which = "the best" if rank == 1 else f"number {rank}"
    how = f", each {which} of {best_of} by reward" if best_of != 1 else ""
    lines = [f"{len(traces):,} traces kept{how}."]
    if rewards:
        line = (
            f"Mean reward of the kept ones {number(fmean(rewards))} "
            f"(worst {number(min(rewards))}, best {number(max(rewards))})"
        )
        if how and "collect/reward_mean_of_n" in metrics:
            line += f"; of everything sampled {number(metrics['collect/reward_mean_of_n'])}"
        lines[0] += f" {line}."
    shares = [
        f"{percent(metrics[name])} {what}"
        for name, what in (
            ("collect/cut_rate", "of the problems cut out, their traces too long for the student"),
            ("collect/tag_inside_rate", "left out with a tag inside"),
            ("collect/unclosed_rate", "left out as never closed"),
            ("collect/wrong_rate", "left out with a wrong answer"),
            ("collect/end_tag_rate", "of the kept ones closed by the teacher"),
        )
        if name in metrics
    ]
    if shares:
        lines.append(f"{'; '.join(shares)}.")
    means = mean_terms(traces)
    if means:
        terms = "; ".join(f"{name} {number(value)}" for name, value in means.items())
        lines.append(f"Mean of the kept traces by term, unweighted: {terms}.")
    return lines


def score_result(run: Run) -> list[str]:
    """Return sentences on the result of scoring explanations."""
    metrics = run.metrics
    if "score/reward" not in metrics:
        return []
    low, high = metrics["score/reward_low"], metrics["score/reward_high"]
    lines = [
        f"{number(metrics['score/rows'])} explanations scored: mean reward "
        f"{number(metrics['score/reward'])} [{number(low)}, {number(high)}], 95 % interval."
    ]
    if metrics["score/kept"] < metrics["score/rows"]:
        lines.append(
            f"The best {number(metrics['score/kept'])} are written as traces: mean reward "
            f"{number(metrics['score/kept_reward'])}."
        )
    terms = "; ".join(
        f"{name.removeprefix('score/reward_terms/')} {number(value)}"
        for name, value in metrics.items()
        if name.startswith("score/reward_terms/")
    )
    return [*lines, f"Mean by term, unweighted: {terms}."]


def mean_terms(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the mean of each reward term over the rows that have it."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, value in reward_terms(row).items():
            columns.setdefault(name, []).append(value)
    return {name: fmean(values) for name, values in columns.items()}


def evaluate_result(run: Run) -> list[str]:
    """Return sentences on the result of an evaluation."""
    metrics, k = run.metrics, accuracy_k(run.metrics)
    if k is None:
        return []
    on = f" on {run.benchmark_name}" if run.benchmark_name else ""
    lines = [
        f"avg@{k}{on}: {accuracy(metrics, f'eval/avg@{k}')}, 95 % interval over "
        f"{number(metrics.get('eval/questions', float('nan')))} questions, {k} answers each."
    ]
    if k > 1:
        lines.append(f"pass@{k}: {accuracy(metrics, f'eval/pass@{k}')}.")
    if "eval/no_answer_rate" in metrics:
        lines.append(f"Completions without an answer: {percent(metrics['eval/no_answer_rate'])}.")
    failed = metrics.get("eval/grading_error_rate", 0.0)
    if failed > 0:
        lines.append(f"The grader failed on {percent(failed)} of the answers; they count as wrong.")
    return lines
