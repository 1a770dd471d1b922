"""Check a composed config and run its stage: what every entrypoint ends in."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig


def run(cfg: DictConfig, run_dir: Path, metadata: dict[str, Any] | None = None) -> dict[str, float]:
    """Check a composed config, then run its stage (or, with `check=true`, print its plan).

    Args:
        metadata: how the run was asked for, for its manifest.

    Returns:
        The final metrics; empty with `check=true`.

    Raises:
        ConfigError: the config has unknown keys, missing values or targets that are refused.
    """
    from rlt.cli.quiet_libraries import quiet
    from rlt.config.build import build_stage
    from rlt.preflight.plan import print_plan
    from rlt.stages.run import run_stage

    stage = build_stage(cfg)
    quiet()
    if cfg.get("check"):
        print_plan(cfg, stage, run_dir)
        return {}
    return run_stage(cfg, run_dir, metadata=metadata, stage=stage)
