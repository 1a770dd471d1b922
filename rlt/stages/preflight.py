"""Reward preflight of a stage: explanations of known quality, scored, and what came out as a table.

Labels and areas are `rlt.rewards.preflight`'s; here they meet a stage's data and models. The result
is printed, written to preflight.json and among the run's metrics.
"""

import dataclasses
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlt.data.dataset import ProblemData
from rlt.data.problem import Problem
from rlt.data.renderer import Renderer
from rlt.llm.models import context_tokens
from rlt.rewards import RewardScorer, ScoredExplanation
from rlt.rewards.preflight import (
    WHOLE,
    Area,
    Preflight,
    areas,
    corrupted,
    ends_in,
    signed_columns,
)
from rlt.runs import ranks
from rlt.runs.files import write_json
from rlt.stages.common import progress

log = logging.getLogger(__name__)

PREFLIGHT_FILE = "preflight.json"
_ROWS_AT_ONCE = 64
Labels = dict[str, list[bool | None]]


def preflight_areas(
    settings: Preflight,
    problems: Sequence[Problem],
    data: ProblemData,
    scorer: RewardScorer,
    seed: int,
) -> list[Area]:
    """Areas over the data's own explanations and damaged copies of them.

    Each text is rewarded as if a teacher were certain of it (see `RewardScorer.as_if_certain`).
    Texts that are longer than the student's context are left out.
    """
    if "correct_rate" in scorer.reward.needs:
        log.info("reward preflight: left out, as this reward samples answers to each explanation")
        return []
    context = context_tokens(scorer.student)

    def fits(problem: Problem) -> bool:
        return student_tokens(scorer.renderer, problem) <= context

    explained = (one for one in problems if one.explanation is not None and fits(one))
    own = list(itertools.islice(explained, settings.problems))
    labels = own_labels(own, data)
    behaviours = labels.get("behaviour", [True] * len(own))
    kept = [n for n, good in enumerate(behaviours) if good]  # only good ones are worth damaging
    texts = [own[n].explanation or "" for n in kept]
    solutions = [own[n].solution for n in kept]
    rows = list(own)
    for name in settings.corruptions:
        copies = corrupted(texts, solutions, name, seed) if len(kept) > 1 else []
        damaged = [
            dataclasses.replace(own[n], explanation=copy)
            for n, copy in zip(kept, copies, strict=False)
            if copy is not None
        ]
        damaged = [problem for problem in damaged if fits(problem)]
        marks: list[bool | None] = [None] * len(rows)
        for n in kept:
            marks[n] = True
        labels[name] = [*marks, *[False] * len(damaged)]
        rows += damaged
    padded = {name: [*marks, *[None] * (len(rows) - len(marks))] for name, marks in labels.items()}
    columns: dict[str, list[float]] = {}
    with progress() as bar:
        task = bar.add_task("reward preflight", total=len(rows))
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[start : start + _ROWS_AT_ONCE]
            table = scorer.as_if_certain(scored_explanations(some, scorer.renderer))
            for name, values in signed_columns(scorer.reward, table).items():
                columns.setdefault(name, []).extend(values)
            bar.update(task, advance=len(some))
    return areas(columns, padded, [row.id for row in rows])


def student_tokens(renderer: Renderer, problem: Problem) -> int:
    """Length of the student's whole text: prompt, explanation, solution."""
    text = renderer.student_text(problem, renderer.thought(problem.explanation or ""))
    return len(text.prompt) + len(text.continuation)


def scored_explanations(problems: Sequence[Problem], renderer: Renderer) -> list[ScoredExplanation]:
    """Explanations given as text, as a teacher would have written and closed them."""
    explanations = [
        renderer.explanation(renderer.thought(p.explanation or "") + renderer.encode(renderer.stop))
        for p in problems
    ]
    return [
        ScoredExplanation(problem, one, renderer.teacher_prompt(problem), None)
        for problem, one in zip(problems, explanations, strict=True)
    ]


def own_labels(problems: Sequence[Problem], data: ProblemData) -> Labels:
    """What classifier and verifier, where the data has them, say of the problems' explanations."""
    labels: Labels = {}
    texts = [problem.explanation or "" for problem in problems]
    if data.behaviour is not None:
        labels["behaviour"] = [
            data.behaviour(problem.question, problem.solution, text) in data.behaviour.good
            for problem, text in zip(problems, texts, strict=True)
        ]
    if data.grader is not None:
        ends = [ends_in(text) for text in texts]
        verdicts = data.grader.grade_all(list(zip(problems, ends, strict=True)))
        labels["verifier"] = [None if v.failed else v.correct for v in verdicts]
    return labels


def tell_areas(found: Sequence[Area], settings: Preflight, folder: Path) -> dict[str, float]:
    """Print the areas, warn if the whole reward's are low, write them down.

    Returns:
        The areas as metrics (docs/metrics.md).
    """
    write_json(folder / PREFLIGHT_FILE, [area.row() for area in found])
    if not found:
        return {}
    table = Table(title="does the reward tell good explanations from bad? area under the ROC curve")
    for column in ("against", "by", "area", "95 % interval", "good", "bad"):
        table.add_column(column, overflow="fold")
    for area in found:
        interval = area.interval
        shown = f"{interval.mean:.2f}", f"{interval.low:.2f} to {interval.high:.2f}"
        table.add_row(area.against, area.term, *shown, str(area.good), str(area.bad))
    if ranks.is_main():
        Console().print(table)
    warning = settings.warning(found)
    if warning is not None:
        log.warning("preflight: %s", warning)
    return metrics_of(found)


def metrics_of(found: Sequence[Area]) -> dict[str, float]:
    """Areas of the whole reward and their intervals; those of its terms are in preflight.json."""
    metrics: dict[str, float] = {}
    for area in found:
        if area.term == WHOLE:
            metrics[f"preflight/{area.against}_area"] = area.interval.mean
            metrics[f"preflight/{area.against}_area_low"] = area.interval.low
            metrics[f"preflight/{area.against}_area_high"] = area.interval.high
    return metrics
