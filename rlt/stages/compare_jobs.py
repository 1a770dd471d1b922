"""The page of a sweep is written when its last job has ended or when the sweep was stopped."""

import atexit
import logging
from functools import partial
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from rlt.sweeps.jobs import find_jobs
from rlt.sweeps.study import Measure, arms_of

log = logging.getLogger(__name__)


class CompareJobs(Callback):
    """Runs `stage=compare` over the jobs of a multirun, into `<sweep folder>/compare`.

    A sweep file chooses it as `hydra.callbacks.compare`. Its arguments are those of
    `stage=compare`, with one exception: if no job of the reference has finished, the first arm
    replaces it.
    """

    def __init__(
        self,
        reference: str | None = None,
        evaluations: str = "last",
        metric: str | None = None,
        direction: str | None = None,
        title: str | None = None,
    ) -> None:
        Measure(metric, direction)  # raises before the sweep begins
        self.reference = reference
        self.evaluations = evaluations
        self.metric = metric
        self.direction = direction
        self.title = title

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Arrange for the page to be written even if the sweep ends with an error."""
        # Hydra raises a failed job's error before it tells callbacks that the sweep has ended.
        self.at_exit = partial(self.write, config)
        atexit.register(self.at_exit)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write the page now, and no second time when the process ends."""
        atexit.unregister(self.at_exit)
        self.write(config)

    def write(self, config: DictConfig) -> None:
        """Compare the jobs that have finished so far."""
        from rlt.stages.run import run_stage

        folder = Path(str(config.hydra.sweep.dir))
        if config.check or not folder.is_dir():
            return
        try:
            cfg = OmegaConf.create(
                {
                    "_target_": "rlt.stages.compare.Compare",
                    "stage": "compare",
                    "seed": 0,
                    "runs": [str(folder)],
                    "reference": self._reference(folder),
                    "evaluations": self.evaluations,
                    "metric": self.metric,
                    "direction": self.direction,
                    "title": self.title,
                }
            )
            run_stage(cfg, folder / "compare")
        except (ValueError, FileNotFoundError) as error:
            log.warning("the jobs were not compared: %s", error)

    def _reference(self, folder: Path) -> str | None:
        """The reference, unless it was left out of the sweep, or failed."""
        if self.reference is None:
            return None
        arms = arms_of(find_jobs([str(folder)]), self.evaluations, self.metric)
        names = [arm.name for arm in arms if arm.cells]
        if self.reference not in names:
            first = repr(names[0]) if names else "nothing"
            log.warning("no arm %r: compared with %s instead", self.reference, first)
            return None
        return self.reference
