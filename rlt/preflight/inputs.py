"""The inputs of a stage that can be read without weights: model sizes, tokenizers, problems.

An input on a hub that cannot be reached is None, and the plan says that it was not checked.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from omegaconf import DictConfig, OmegaConf

from rlt.data.problem import Problem
from rlt.data.renderer import Renderer
from rlt.preflight.memory_estimate import Lengths, Shape, lengths_of, shape_of
from rlt.stages.common import require_same_tokenizer
from rlt.stages.stage import FIRST_LOOK, Inputs, ModelStage
from rlt.stages.training import TrainingStage

log = logging.getLogger(__name__)

Seen = dict[str, Any]  # problems and tokenizers that other steps have already read


def shape_for(stage: ModelStage, role: str, seen: Seen) -> Shape | None:
    """Return the sizes of a role's model, or None if its hub cannot be reached.

    A model that an earlier step will make has the sizes of the model that it starts from.
    """
    source = stage.source(role)
    trained = isinstance(stage, TrainingStage) and role == stage.trains
    adapter = stage.adapting if isinstance(stage, TrainingStage) else None
    key = f"shape of {source} with {adapter}, trained {trained}"
    if key not in seen:
        try:
            seen[key] = shape_of(source, adapter, trained)  # type: ignore[arg-type]
        except OSError as error:
            log.debug("%s: %s", role, error)
            seen[key] = None
    shape: Shape | None = seen[key]
    return shape


def model_name(cfg: DictConfig, role: str, made_here: Mapping[str, str]) -> str:
    """Return the name of a role's model for the plan.

    Args:
        made_here: path key → earlier step of the pipeline that will make the model.
    """
    if f"{role}_path" in made_here:
        return f"from {made_here[f'{role}_path']}"
    node = cfg[role]
    default = node.get("path") or node.get("package") or node["_target_"].rpartition(".")[2]
    return str(cfg.get(f"{role}_path") or default)


def renderer_for(
    cfg: DictConfig, stage: ModelStage, role: str, made_here: Mapping[str, str], seen: Seen
) -> tuple[Renderer | None, str]:
    """Return a renderer with the role's tokenizer, or None and the reason.

    Raises:
        ValueError: the hub has no such model.
        FileNotFoundError: there is no such local model.
    """
    source: Any = stage.source(role)
    node = OmegaConf.to_yaml(cfg[role], resolve=True)
    key = f"{node} at {cfg.get(f'{role}_path') if f'{role}_path' not in made_here else None}"
    try:
        if key not in seen:
            seen[key] = source.tokenizer()
        return Renderer(stage.prompt, seen[key]), ""
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
    """Return the name of the hub's error if it was reached and lacks the repository or file."""
    missing = RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError
    while error is not None:
        if isinstance(error, LocalEntryNotFoundError):
            return None  # the hub was not reached; this is a subclass of EntryNotFoundError
        if isinstance(error, missing):
            return type(error).__name__
        error = error.__cause__ or error.__context__
    return None


def read_inputs(
    cfg: DictConfig, stage: ModelStage, renderer: Renderer | None, seen: Seen
) -> Inputs:
    """Return what the stage reads, or a note that its hub was not reached."""
    nodes = [cfg.get(name) for name in ("benchmark", "data", "traces", "trained_on")]
    key = "\n".join(
        OmegaConf.to_yaml(node, resolve=True) if OmegaConf.is_config(node) else str(node)
        for node in nodes
    )
    key += f"{stage.reads} {getattr(stage, 'explanations', None)} {type(stage).read.__qualname__}"
    if key not in seen:
        try:
            seen[key] = stage.read(renderer)
        except ValueError as error:
            if not isinstance(error.__cause__, ConnectionError):
                raise
            seen[key] = Inputs(None, [], f"{stage.reads}: hub not reached, not checked")
    inputs: Inputs = seen[key]
    return inputs


@dataclass(frozen=True)
class Look:
    """What is known of a stage's models and data before any weights are loaded.

    Attributes:
        reads: lines of a plan on models and data.
        shapes: role → sizes of its model; a model whose hub was not reached is missing.
        inputs: what the stage reads.
        lengths: of a sample of its rows, the longest among them; None if a hub was not reached.
    """

    reads: list[str]
    shapes: dict[str, Shape]
    inputs: Inputs
    lengths: Lengths | None


def look_at(cfg: DictConfig, stage: ModelStage, made_here: Mapping[str, str], seen: Seen) -> Look:
    """Return the sizes of a stage's models and the lengths of its rows, and check that these fit.

    Args:
        made_here: path key → earlier step of the pipeline that will make the file or model.
        seen: inputs that other steps have already read.

    Raises:
        ValueError, FileNotFoundError: the run itself would fail with this error.
    """
    reads, tokenizers = [], []
    shapes: dict[str, Shape] = {}
    renderer = None
    for role in stage.roles:
        renderer, why = renderer_for(cfg, stage, role, made_here, seen)
        shape = shape_for(stage, role, seen)
        size = f", {shape.parameters / 1e6:,.1f} M parameters" if shape is not None else ""
        size += f", {shape.adapter / 1e6:,.2f} M trained" if shape and shape.adapter else ""
        reads.append(f"{role}: {model_name(cfg, role, made_here)}{size}{why}")
        shapes |= {role: shape} if shape is not None else {}
        tokenizers += [renderer.tokenizer] if renderer is not None else []
    if len(tokenizers) == 2:
        require_same_tokenizer(*tokenizers)
    inputs = read_inputs(cfg, stage, renderer, seen)
    reads.append(inputs.in_words)
    if inputs.problems is None or renderer is None:
        return Look(reads, shapes, inputs, None)
    problems = inputs.problems + inputs.held_out
    longest = sorted(problems, key=_characters, reverse=True)[:FIRST_LOOK]
    some = longest[: FIRST_LOOK // 8] + problems[: FIRST_LOOK - FIRST_LOOK // 8]
    contexts = {role: shape.context for role, shape in shapes.items()}
    stage.check_lengths(contexts, longest, renderer)
    return Look(reads, shapes, inputs, lengths_of(stage.rows(some, renderer)))


def _characters(problem: Problem) -> int:
    return sum(map(len, (problem.question, problem.solution, problem.explanation or "")))
