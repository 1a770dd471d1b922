"""Sweeps whose next values Optuna chooses: `hydra/sweeper=optuna` (`conf/hydra/sweeper`)."""
