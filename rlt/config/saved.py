"""Configs that runs have saved, read back with the types and checks of their stage."""

from pathlib import Path

from hydra.core.utils import setup_globals
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlt.config import schema
from rlt.config.allowed_targets import raise_if_any
from rlt.config.check import check_schema_keys, check_targets


def load_config(file: Path) -> DictConfig:
    """A saved config, checked as a composed one is, with the types that its stage gives it.

    Raises:
        ValueError: it is no config of a stage, or has keys, values or targets that are refused.
    """
    setup_globals()  # Hydra's resolver `now`
    try:
        saved = OmegaConf.load(file)
        try:
            types = schema.of(saved.get("stage") if isinstance(saved, DictConfig) else None)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        assert isinstance(saved, DictConfig)
        raise_if_any(check_schema_keys(saved, types))
        cfg = OmegaConf.merge(OmegaConf.structured(types), saved)
    except OmegaConfBaseException as error:
        raise ValueError(f"{file}: {str(error).splitlines()[0]}") from error
    assert isinstance(cfg, DictConfig)
    OmegaConf.set_struct(cfg, True)
    raise_if_any(check_targets(cfg))
    return cfg
