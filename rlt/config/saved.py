"""Configs that runs have saved, read back with the checks of a composed one."""

from pathlib import Path

from hydra.core.utils import setup_globals
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlt.config.allowed_targets import raise_if_any
from rlt.config.check import check_targets


def load_config(file: Path) -> DictConfig:
    """A saved config, checked as a composed one is.

    Raises:
        ValueError: it is no config of a stage, or has keys, values or targets that are refused.
    """
    setup_globals()  # Hydra's resolver `now`
    try:
        cfg = OmegaConf.load(file)
        if not isinstance(cfg, DictConfig) or "_target_" not in cfg:
            raise ValueError(
                f"{file}: this is no config of a run, because it names no stage under _target_"
            )
        OmegaConf.set_struct(cfg, True)
        raise_if_any(check_targets(cfg))
    except OmegaConfBaseException as error:
        raise ValueError(f"{file}: {str(error).splitlines()[0]}") from error
    return cfg
