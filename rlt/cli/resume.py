"""`rlt resume <run>`: go on with a run, or with a sweep, from what its folder holds."""

import os
import re
import sys
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlt.cli import hydra_app
from rlt.cli.run import run
from rlt.config.saved import load_config
from rlt.config.suggestions import explain_struct_error
from rlt.runs.files import read_json


def resume(folder: Path, overrides: list[str]) -> int:
    """Go on with a run, or with a sweep.

    Args:
        overrides: new values of keys that may change (`rlt.runs.folder.MAY_CHANGE`), or that
            `accept_changes=[…]` names.

    Returns:
        The exit status, 0.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: a key that it has not, or that may not change.
    """
    run_dir = folder.absolute()
    if (run_dir / "multirun.yaml").is_file():
        return _resume_sweep(run_dir, overrides)
    manifest_file = run_dir / "manifest.json"
    if not manifest_file.is_file():
        raise FileNotFoundError(
            f"{folder}: no run is there (no manifest.json); give a run's folder, which the "
            "run named when it was interrupted"
        )
    manifest = read_json(manifest_file)
    if run_dir.name == manifest["key"]:
        raise ValueError(
            f"{folder}: this is a step of a pipeline, which its pipeline goes on with; "
            "resume that, or repeat its command"
        )
    composed = run_dir / "composed.yaml"
    cfg = load_config(composed if composed.is_file() else run_dir / "config.yaml")
    _change(cfg, overrides)
    cfg.output_dir = str(run_dir)
    if (cwd := manifest.get("cwd")) and Path(cwd).is_dir():
        os.chdir(cwd)  # where relative paths in the config start
    print(f"rlt: going on with {run_dir} (stage={cfg.stage})", flush=True)
    run(cfg, run_dir, {"overrides": [*manifest.get("overrides", []), *overrides]})
    return 0


def _change(cfg: DictConfig, overrides: list[str]) -> None:
    for override in OverridesParser.create().parse_overrides(overrides):
        key, written = override.key_or_group, override.input_line
        if key == "output_dir":
            raise ValueError(f"{written}: a run goes on where it is; leave it out")
        plain = not (override.is_add() or override.is_delete() or override.is_sweep_override())
        if not plain or override.package is not None:
            raise ValueError(f"{written}: resume takes key=value, to change a value")
        try:
            if isinstance(
                OmegaConf.select(cfg, key, throw_on_resolution_failure=False), DictConfig
            ):
                raise ValueError(
                    f"{written}: resume changes values below {key}, not the whole part; begin "
                    "another run for that"
                )
            OmegaConf.update(cfg, key, override.value(), merge=False)
        except OmegaConfBaseException as error:
            raise ValueError(f"{written}: {explain_struct_error(error, map(str, cfg))}") from error


def _resume_sweep(folder: Path, overrides: list[str]) -> int:
    """The sweep's own command once more: finished jobs are not repeated."""
    saved: Any = OmegaConf.load(folder / "multirun.yaml")
    hydra = saved.hydra
    if overrides:
        raise ValueError(
            f"{' '.join(overrides)}: a sweep goes on as it began; change its command instead, and "
            "give it another output_dir"
        )
    given = _overrides_alone([*hydra.overrides.hydra, *hydra.overrides.task], folder)
    given += [f"output_dir={quoted(str(folder))}"]
    os.chdir(hydra.runtime.cwd)
    sources = [s for s in hydra.runtime.config_sources if s.provider == "command-line"]
    sys.argv[1:] = [*(f"--config-dir={source.path}" for source in sources), *given]
    print(f"rlt: going on with {' '.join(sys.argv[1:])}", flush=True)
    hydra_app.compose_and_run()
    return 0


def _overrides_alone(saved: list[Any], folder: Path) -> list[str]:
    """What a sweep was told, without its folder; an option of the program is refused.

    Raises:
        ValueError: one of them is no override.
    """
    given = []
    for one in saved:
        try:
            if not isinstance(one, str) or one.lstrip().startswith("-"):
                raise ValueError
            (override,) = OverridesParser.create().parse_overrides([one])
        except (ValueError, HydraException) as error:
            raise ValueError(
                f"{folder / 'multirun.yaml'}: {one!r} is no override; a sweep is told key=value "
                "alone. Begin it again by its own command"
            ) from error
        if override.key_or_group != "output_dir":
            given.append(one)
    return given


def quoted(text: str) -> str:
    """A value for Hydra's command line, whatever characters it has."""
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text)
    return f"'{escaped}'"
