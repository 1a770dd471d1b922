"""Sweeps whose next values Optuna chooses: `hydra/sweeper=optuna` (`conf/hydra/sweeper`)."""

from hydra_plugins.rlt_optuna.sweeper import OptunaSweeper

__all__ = ["OptunaSweeper"]
