"""The entrypoint: compose, check, seed, run the stage, return its metrics.

    rlt experiment=quickstart
    rlt stage=teacher_rl reward=rlt check=true
    rlt -m stage=teacher_rl reward=rlt,solution_only seed=0,1
"""

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from rlt import schema

# Errors that say what to change; their message is enough, unless HYDRA_FULL_ERROR=1.
_USER_ERRORS = (ValueError, FileNotFoundError)


def config_dir() -> Path:
    """The config groups: in the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "conf"


def _register() -> None:
    schema.register()
    OmegaConf.register_new_resolver(
        "run_dir", lambda chosen, default: chosen or default, replace=True
    )


_register()


def run(cfg: DictConfig, run_dir: Path) -> dict[str, float]:
    """Check a composed config, then run its stage (or, with `check=true`, print its plan)."""
    from rlt.checks import check_targets, raise_if_any

    raise_if_any(check_targets(cfg))
    from rlt.quiet import quiet
    from rlt.stages import run_stage
    from rlt.stages.plan import print_plan

    quiet()

    if cfg.check:
        print_plan(cfg, run_dir)
        return {}
    return run_stage(cfg, run_dir)


@hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
def _task(cfg: DictConfig) -> dict[str, float]:
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    try:
        return run(cfg, run_dir)
    except _USER_ERRORS as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1" or HydraConfig.get().mode.name == "MULTIRUN":
            raise
        print(f"\nrlt: {type(error).__name__}: {error}", file=sys.stderr)
        print("(HYDRA_FULL_ERROR=1 shows where)", file=sys.stderr)
        sys.exit(2)
    finally:
        if run_dir.is_dir() and not any(run_dir.iterdir()):
            run_dir.rmdir()  # made by Hydra before anything was checked


def main() -> None:
    _task()


if __name__ == "__main__":
    main()
