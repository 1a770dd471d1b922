"""Check a composed config and run its stage: what every entrypoint ends in."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from rlt.config import schema


def run(cfg: DictConfig, run_dir: Path, metadata: dict[str, Any] | None = None) -> dict[str, float]:
    """Check a composed config, then run its stage (or, with `check=true`, print its plan).

    Args:
        metadata: how the run was asked for, for its manifest.

    Returns:
        The final metrics; empty with `check=true`.

    Raises:
        ConfigError: the config has unknown keys, missing values or targets that are refused.
    """
    from rlt.config.allowed_targets import raise_if_any
    from rlt.config.check import check_schema_keys, check_targets

    raise_if_any(check_schema_keys(cfg, schema.of(cfg.stage)) + check_targets(cfg))
    from rlt.cli.quiet_libraries import quiet
    from rlt.preflight.plan import print_plan
    from rlt.stages import run_stage

    quiet()

    if cfg.check:
        print_plan(cfg, run_dir)
        return {}
    return run_stage(cfg, run_dir, metadata=metadata)
