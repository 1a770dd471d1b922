"""Check a composed config and run its stage: what every entrypoint ends in."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from rlt.runs import ranks


def run(cfg: DictConfig, run_dir: Path, metadata: dict[str, Any] | None = None) -> dict[str, float]:
    """Check a composed config, then run its stage (or, with `check=true`, print its plan).

    On several devices, each rank runs the stage in a process of its own.

    Args:
        metadata: how the run was asked for, for its manifest.

    Returns:
        The final metrics; empty with `check=true`.

    Raises:
        ConfigError: the config has unknown keys, missing values or targets that are refused.
        ValueError: `hardware` asks for devices that cannot be counted, or for nodes that a launcher
            must start.
    """
    from rlt.cli.launch import join_ranks, launched, run_ranks
    from rlt.cli.quiet_libraries import quiet
    from rlt.config.build import build_stage
    from rlt.preflight.plan import print_plan
    from rlt.stages.run import run_stage

    stage = build_stage(cfg)
    quiet()
    hardware = cfg.get("hardware")
    devices = 1 if hardware is None else ranks.devices_of(hardware)
    if cfg.get("check"):
        print_plan(cfg, stage, run_dir)
        return {}
    if hardware is None or not (launched() or devices * hardware.num_nodes > 1):
        return run_stage(cfg, run_dir, metadata=metadata, stage=stage)
    if not launched():
        if hardware.num_nodes > 1:
            raise ValueError(
                f"hardware.num_nodes={hardware.num_nodes}: start the same command on every node by "
                "srun or torchrun (docs/scaling.md)"
            )
        return run_ranks(cfg, run_dir, metadata, devices)
    join_ranks(hardware)
    try:
        run_dir = ranks.from_main(lambda: run_dir, "choosing the folder")  # it may name the time
        metrics = run_stage(cfg, run_dir, metadata=metadata, stage=stage)
        ranks.from_main(lambda: None, "ending")  # one that hangs from here on is still told
        return metrics
    finally:
        ranks.leave()
