"""Small configs to be checked, and targets that they name."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

ALGORITHM = "rlt.training.algorithms.Algorithm"
SLURM = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"


def config(content: Any) -> DictConfig:
    cfg = OmegaConf.create(content)
    assert isinstance(cfg, DictConfig)
    return cfg
