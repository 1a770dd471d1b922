"""The page of a sweep, written when its last job has ended, or the sweep was stopped."""

import atexit
import logging
from functools import partial
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

log = logging.getLogger(__name__)


class CompareJobs(Callback):
    """Runs `stage=compare` over the jobs of a multirun, into `<sweep folder>/compare`.

    Chosen in a sweep file as `hydra.callbacks.compare`; arguments are those of `stage=compare`, but
    that a reference which was left out of the sweep gives way to the first arm.
    """

    def __init__(
        self, reference: str | None = None, evaluations: str = "last", title: str | None = None
    ) -> None:
        self.reference = reference
        self.evaluations = evaluations
        self.title = title

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        # Hydra raises a failed job's error before it tells callbacks that the sweep has ended.
        self.at_exit = partial(self.write, config)
        atexit.register(self.at_exit)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        atexit.unregister(self.at_exit)
        self.write(config)

    def write(self, config: DictConfig) -> None:
        """Compare the jobs that have finished so far."""
        from rlt.report.study import read_study
        from rlt.schema import Compare
        from rlt.stages import run_stage

        folder = Path(str(config.hydra.sweep.dir))
        if config.check or not folder.is_dir():
            return
        try:
            _, arms, first = read_study([str(folder)], None, self.evaluations)
            reference = self.reference
            if reference not in [None, *(arm.name for arm in arms)]:
                log.warning("no arm %r: compared with %r instead", reference, first.name)
                reference = None
            cfg = OmegaConf.structured(
                Compare(
                    stage="compare",
                    runs=[str(folder)],
                    reference=reference,
                    evaluations=self.evaluations,
                    title=self.title,
                )
            )
            run_stage(cfg, folder / "compare")
        except (ValueError, FileNotFoundError) as error:
            log.warning("the jobs were not compared: %s", error)
