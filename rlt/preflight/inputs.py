"""What a stage reads, looked at without weights: sizes of models, tokenizers, problems.

What lies on a hub that cannot be reached is None, and said to be not checked.
"""

import logging
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from omegaconf import DictConfig, OmegaConf

from rlt.config.build import build
from rlt.data.problem import Problem
from rlt.data.renderer import Renderer
from rlt.preflight.memory_estimate import Shape, shape_of
from rlt.stages.common import FIRST_LOOK, source_of
from rlt.stages.evaluate import check_contamination
from rlt.stages.score import explained

log = logging.getLogger(__name__)

Seen = dict[str, Any]  # what other steps have read already: problems, tokenizers


def shape_for(cfg: DictConfig, role: str, made_here: Mapping[str, str], seen: Seen) -> Shape | None:
    """Sizes of a role's model; of one that an earlier step makes, those of what it starts from."""
    source = source_of(cfg, role) if f"{role}_path" not in made_here else build(cfg[role])
    key = f"shape of {source}"
    if key not in seen:
        try:
            seen[key] = shape_of(source)
        except OSError as error:
            log.debug("%s: %s", role, error)
            seen[key] = None
    shape: Shape | None = seen[key]
    return shape


def has_grader(cfg: DictConfig) -> bool:
    return cfg.data is not None and cfg.data.grader is not None


def model_name(cfg: DictConfig, role: str, made_here: Mapping[str, str]) -> str:
    if f"{role}_path" in made_here:
        return f"from {made_here[f'{role}_path']}"
    node = cfg[role]
    default = node.get("path") or node.get("package") or node["_target_"].rpartition(".")[2]
    return str(cfg.get(f"{role}_path") or default)


def renderer_for(
    cfg: DictConfig, role: str, style: Any, made_here: Mapping[str, str], seen: Seen
) -> tuple[Any, str]:
    """Renderer with the role's tokenizer, or None and why there is none to look at."""
    source = source_of(cfg, role) if f"{role}_path" not in made_here else build(cfg[role])
    node = OmegaConf.to_yaml(cfg[role], resolve=True)
    key = f"{node} at {cfg.get(f'{role}_path') if f'{role}_path' not in made_here else None}"
    try:
        if key not in seen:
            seen[key] = source.tokenizer()
        return Renderer(style, seen[key]), ""
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not getattr(source, "path", "").count("/") == 1:
            raise
        if (refusal := hub_refusal(error)) is not None:
            raise ValueError(
                f"{role}.path={source.path}: the hub has no such model ({refusal})"
            ) from error
        log.debug("tokenizer: %s", error)
        return None, " (hub not reached: tokenizer not checked)"


def hub_refusal(error: BaseException | None) -> str | None:
    """What the hub answered, if it was reached and had no such repository, file or revision."""
    missing = RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError
    while error is not None:
        if isinstance(error, LocalEntryNotFoundError):
            return None  # it was not reached: a subclass of the next
        if isinstance(error, missing):
            return type(error).__name__
        error = error.__cause__ or error.__context__
    return None


def read_problems(
    cfg: DictConfig, renderer: Any, seen: Seen
) -> tuple[list[Problem] | None, list[Problem], str]:
    """Training problems (or questions), those held out, and a line about what was read."""
    wanted = cfg.benchmark if cfg.stage == "evaluate" else cfg.data
    node = OmegaConf.to_yaml(wanted, resolve=True) if wanted is not None else str(cfg.traces)
    node += OmegaConf.to_yaml(cfg.get("trained_on") or {}, resolve=True)
    if node not in seen:
        seen[node] = _read(cfg, renderer)
    problems, held_out, counted = seen[node]
    return problems, held_out, counted


def _read(cfg: DictConfig, renderer: Any) -> tuple[list[Problem] | None, list[Problem], str]:
    forbidden = renderer.forbidden if renderer is not None else build(cfg.prompt).forbidden
    count = renderer.count_tokens if renderer is not None else len
    try:
        if cfg.stage == "evaluate":
            benchmark = build(cfg.benchmark)
            questions = benchmark.load(build(cfg.prompt).forbidden, count)
            if renderer is not None:
                check_contamination(cfg, renderer, questions)
            return questions, [], f"benchmark {benchmark.name}: {len(questions)} questions"
        data = explained(cfg) if cfg.stage == "score" else build(cfg.data)
        split = data.load(forbidden, count)
        for problem in split.train[:FIRST_LOOK] if renderer is not None else ():
            renderer.teacher_prompt(problem)  # a tokenizer that cannot read them is told here
    except ValueError as error:
        if not isinstance(error.__cause__, ConnectionError):
            raise
        name = f"benchmark {cfg.benchmark.name}" if cfg.stage == "evaluate" else "data"
        return None, [], f"{name}: hub not reached, not checked"
    bad = sum(split.report["bad"].values())
    return (
        split.train,
        split.validation,
        (
            f"data: {len(split.train)} training, {len(split.validation)} held out"
            + (f", {bad} broken rows skipped" if bad else "")
        ),
    )
