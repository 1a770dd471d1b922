"""From one pipeline config to the config of each of its steps, and to the keys of their results.

A step's config is the shared groups its stage uses, with the stage's recipe laid over them, then
the step's own `overrides`, then the paths of its `inputs`. It is an ordinary stage config.
"""

import functools
import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlt import PACKAGE_DIR
from rlt.config.allowed_targets import raise_if_any
from rlt.config.build import build
from rlt.config.check import check_targets
from rlt.config.schema import STAGES, STEP_STAGES
from rlt.config.suggestions import nearest
from rlt.data.problem import content_hash
from rlt.data.traces import find_traces
from rlt.runs.identity import config_key

# What a stage leaves for later ones: config key of the later stage → artefact in the run folder.
ARTEFACTS = {"teacher_path": "model", "student_path": "model", "traces": "traces"}
_MAKERS = {
    "model": ("pretrain", "teacher_sft", "teacher_rl", "distill", "student_rl"),
    "traces": ("collect",),
}


def check_steps(cfg: DictConfig) -> None:
    """Raises ValueError when a step names no stage, a later step, or the wrong kind of artefact."""
    if not cfg.steps:
        raise ValueError("steps is empty: a pipeline runs at least one step")
    earlier: list[str] = []
    for name, step in cfg.steps.items():
        if step.stage not in STEP_STAGES:
            raise ValueError(f"steps.{name}.stage={step.stage}: choose {', '.join(STEP_STAGES)}")
        for key, other in step.inputs.items():
            if key not in ARTEFACTS:
                raise ValueError(
                    f"steps.{name}.inputs.{key}: a step can need {', '.join(ARTEFACTS)}"
                )
            if other not in earlier:
                hint = nearest(other, earlier)
                raise ValueError(
                    f"steps.{name}.inputs.{key}={other}: no step before {name} has that name"
                    + (f"; did you mean {' or '.join(hint)}?" if hint else "")
                )
            if cfg.steps[other].stage not in _MAKERS[ARTEFACTS[key]]:
                raise ValueError(
                    f"steps.{name}.inputs.{key}={other}: stage {cfg.steps[other].stage} makes no "
                    f"{ARTEFACTS[key]}"
                )
        earlier.append(str(name))


def step_config(cfg: DictConfig, name: str, folders: Mapping[str, Path]) -> DictConfig:
    """The stage config of one step.

    Args:
        folders: run folders of the steps before it.

    Raises:
        ValueError: `set` names a key that the stage does not have.
    """
    step = cfg.steps[name]
    schema = STAGES[step.stage]
    names = {f.name for f in fields(schema)}
    raw: Any = OmegaConf.to_container(cfg, resolve=False)
    content = {key: value for key, value in raw.items() if key in names}
    content |= raw[step.stage]
    content["stage"] = step.stage
    projected = OmegaConf.merge(OmegaConf.structured(schema), content)
    assert isinstance(projected, DictConfig)
    OmegaConf.set_struct(projected, True)
    if step.stage == "evaluate":
        projected.trained_on = cfg.data
        if cfg.data.get("parts") is not None:  # other steps may have trained on the other parts
            OmegaConf.update(projected, "trained_on.parts", None)
            OmegaConf.update(projected, "trained_on.part", None)
    for key, value in raw["steps"][name]["overrides"].items():
        try:
            OmegaConf.update(projected, key, value, merge=True)
        except (OmegaConfBaseException, AttributeError) as error:
            raise ValueError(
                f"steps.{name}.overrides.{key}={value}: {str(error).splitlines()[0]}"
            ) from error
    for key, other in step.inputs.items():
        if key not in names:
            raise ValueError(f"steps.{name}.inputs.{key}: stage {step.stage} has no such key")
        projected[key] = str(folders[other] / ARTEFACTS[key])
    if step.stage == "teacher_rl" and projected.reward_student == "reference":
        projected.student = projected.student_path = None
    projected.output_dir = None
    return projected


def check_all(cfg: DictConfig) -> dict[str, DictConfig]:
    """Every step's config, checked before the first step runs; paths are those of the run to be."""
    check_steps(cfg)
    folders = {name: Path(cfg.cache_dir) / name for name in cfg.steps}
    configs = {str(name): step_config(cfg, str(name), folders) for name in cfg.steps}
    errors = [f"step {name}: {e}" for name, c in configs.items() for e in check_targets(c)]
    raise_if_any(errors)
    return configs


def step_key(cfg: DictConfig, step: DictConfig, keys: Mapping[str, str]) -> str:
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
    """Hex digest of length 16 over a file's bytes, or over those of all files below a folder but
    its README.md, which tells the date.

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
