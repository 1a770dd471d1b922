"""From one pipeline config to the config of each of its steps, and to the keys of their results.

A step's config is the shared groups that its stage uses, with the stage's own part of the pipeline
config laid over them, then the step's own `overrides`, then the paths of its `inputs`. It is an
ordinary stage config.
"""

import functools
import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from rlt import PACKAGE_DIR
from rlt.config.allowed_targets import resolve_target
from rlt.config.build import build, is_stage, stage_class
from rlt.config.check import RUN_KEYS
from rlt.config.suggestions import did_you_mean, nearest
from rlt.data.problem import content_hash
from rlt.data.traces import find_traces
from rlt.runs.identity import config_key

# What a stage leaves for later ones: config key of the later stage → artefact in the run folder.
ARTEFACTS = {"teacher_path": "model", "student_path": "model", "traces": "traces"}


@dataclass(frozen=True)
class Step:
    """One stage run inside a pipeline.

    Attributes:
        stage: the key under which the pipeline config holds that stage's own part.
        inputs: config key that takes a path → the earlier step whose artefact it is.
        overrides: config key of the stage (dotted) → value, for this step alone.
        gate: final metric → its smallest value, below which the pipeline stops here.
        label: name in tables and plots; the step's own name if None.
    """

    stage: str
    inputs: dict[str, str] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    gate: dict[str, float] = field(default_factory=dict)
    label: str | None = None


def read_steps(cfg: DictConfig) -> dict[str, Step]:
    """The steps of a pipeline config, in order.

    Raises:
        ValueError: a step names no stage, a later step, the wrong kind of artefact, or has an
            unknown key.
    """
    if not cfg.steps:
        raise ValueError("steps is empty: a pipeline runs at least one step")
    if not isinstance(cfg.steps, DictConfig):
        raise ValueError(
            f"steps={cfg.steps}: must be a mapping of names to steps; arm={cfg.steps} chooses the "
            "steps of a file in conf/arm/"
        )
    known = [one.name for one in fields(Step)]
    stages = stages_of(cfg)
    steps: dict[str, Step] = {}
    for name, node in ((str(key), node) for key, node in cfg.steps.items()):
        content: Any = OmegaConf.to_container(node, resolve=True) if node is not None else {}
        for key in content:
            if key not in known:
                raise ValueError(
                    f"steps.{name}.{key}: a step has no such key{did_you_mean(key, known)}; valid: "
                    f"{', '.join(known)}"
                )
        step = Step(**{"stage": "", **{k: v for k, v in content.items() if v is not None}})
        if step.stage not in stages:
            raise ValueError(
                f"steps.{name}.stage={step.stage}: choose {', '.join(stages)}"
                f"{did_you_mean(step.stage, stages)}"
            )
        for key, other in step.inputs.items():
            _check_input(name, key, other, step, steps, cfg)
        steps[name] = step
    return steps


def stages_of(cfg: DictConfig) -> list[str]:
    """The stages that a pipeline config holds a part of, each of which a step can be."""
    return [
        str(key)
        for key in cfg
        if isinstance(cfg.get(key), DictConfig)
        and "_target_" in cfg[key]
        and is_stage(resolve_target(cfg[key]["_target_"]))
    ]


def _check_input(
    name: str, key: str, other: str, step: Step, earlier: Mapping[str, Step], cfg: DictConfig
) -> None:
    where = f"steps.{name}.inputs.{key}"
    if key not in ARTEFACTS:
        raise ValueError(f"{where}: a step can need {', '.join(ARTEFACTS)}")
    if other not in earlier:
        hint = nearest(other, list(earlier))
        raise ValueError(
            f"{where}={other}: no step before {name} has that name"
            + (f"; did you mean {' or '.join(hint)}?" if hint else "")
        )
    if key not in [one.name for one in fields(stage_class(cfg[step.stage]))]:
        raise ValueError(f"{where}: stage {step.stage} has no such key")
    maker = earlier[other].stage
    if stage_class(cfg[maker]).makes != ARTEFACTS[key]:
        raise ValueError(f"{where}={other}: stage {maker} makes no {ARTEFACTS[key]}")


def step_config(cfg: DictConfig, name: str, step: Step, folders: Mapping[str, Path]) -> DictConfig:
    """The stage config of one step.

    Args:
        folders: run folders of the steps before it.

    Raises:
        ValueError: `overrides` names a key that the stage does not have.
    """
    owner = stage_class(cfg[step.stage])
    names = {one.name for one in fields(owner)} | set(RUN_KEYS)
    raw: Any = OmegaConf.to_container(cfg, resolve=False)
    content = {key: value for key, value in raw.items() if key in names}
    content |= raw[step.stage]
    content |= {"stage": owner.name}
    for one in fields(owner):
        content.setdefault(one.name, None)
    projected = OmegaConf.create(content)
    OmegaConf.set_struct(projected, True)
    with open_dict(projected):
        owner.as_step(projected, cfg)
    for key, value in raw["steps"][name].get("overrides", {}).items():
        try:
            OmegaConf.update(projected, key, value, merge=True)
        except (OmegaConfBaseException, AttributeError) as error:
            raise ValueError(
                f"steps.{name}.overrides.{key}={value}: {str(error).splitlines()[0]}"
            ) from error
    for key, other in step.inputs.items():
        projected[key] = str(folders[other] / ARTEFACTS[key])
    owner.settle(projected)
    projected.output_dir = None
    return projected


def step_configs(cfg: DictConfig, steps: Mapping[str, Step]) -> dict[str, DictConfig]:
    """Every step's config, with paths that say which step will make what lies there."""
    folders = {name: Path(cfg.cache_dir) / name for name in steps}
    return {name: step_config(cfg, name, step, folders) for name, step in steps.items()}


def step_key(cfg: DictConfig, step: Step, keys: Mapping[str, str]) -> str:
    """Key of a step's result: its config, what it reads, and the code that makes it.

    Args:
        cfg: the step's config.
        step: the step, whose inputs are known by their own keys.
        keys: keys of the steps before it.
    """
    inputs = {key: keys[other] for key, other in step.inputs.items()}
    return config_key(
        cfg, {**input_fingerprints(cfg, set(inputs)), **inputs, "code": code_digest()}
    )


def input_fingerprints(cfg: DictConfig, leave_out: Collection[str] = ()) -> dict[str, str]:
    """Config key → fingerprint of every file, folder or data set that a stage's config names.

    Args:
        leave_out: keys of paths that are known otherwise.

    Raises:
        FileNotFoundError: one of them is not there.
    """
    files = {key: cfg.get(key) for key in ARTEFACTS if key not in leave_out}
    for role in ("teacher", "student"):
        model = cfg.get(role) or {}
        if cfg.get(f"{role}_path") is None and Path(model.get("path") or "").is_dir():
            files[f"{role}.path"] = model.get("path") or None
        if Path(model.get("chat_template") or "").is_file():
            files[f"{role}.chat_template"] = model.get("chat_template") or None
    files |= dict(_prompt_files(cfg.get("prompt"), "prompt"))
    if files.get("traces"):
        files["traces"] = str(find_traces(files["traces"]))
    found = {key: path_fingerprint(key, Path(file)) for key, file in files.items() if file}
    nodes = {
        "data.source": cfg.get("data") or (cfg.get("benchmark") or {}).get("data"),
        "trained_on.source": cfg.get("trained_on"),
    }
    for key, node in nodes.items():
        if node is not None:
            found[key] = str(build(node).source.describe())
    return found


def _prompt_files(node: Any, path: str) -> Iterator[tuple[str, str]]:
    """(config key, file) of every prompt file, in styles within styles too."""
    for name in map(str, node) if isinstance(node, DictConfig) else ():
        if isinstance(node[name], DictConfig):
            yield from _prompt_files(node[name], f"{path}.{name}")
        elif name.endswith("_file") and node[name] is not None:
            yield f"{path}.{name}", node[name]


@functools.cache
def code_digest() -> str:
    """Digest of what this package computes with: edited code makes results anew."""
    told = ("cli", "preflight", "report", "sweeps", "plugins")  # they change no result
    files = sorted(
        f for f in PACKAGE_DIR.rglob("*.py") if f.relative_to(PACKAGE_DIR).parts[0] not in told
    )
    return content_hash(*(f.read_text(encoding="utf-8") for f in files))


def path_fingerprint(key: str, path: Path) -> str:
    """Hex digest of length 16 over the bytes of a file, or of all files below a folder.

    README.md is left out, because a model's card tells the date.

    Raises:
        FileNotFoundError: there is nothing at the path, which the config gives under `key`.
    """
    if not path.exists():
        hint = f"; give <run>/{ARTEFACTS[key]}" if key in ARTEFACTS else ""
        raise FileNotFoundError(f"{key}={path}: no such file or folder{hint}")
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file() and not (path.is_dir() and file.name == "README.md"):
            digest.update(file.name.encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]
