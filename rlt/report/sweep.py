"""The page of a sweep, written when its last job has ended."""

import logging
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

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from rlt.report.study import read_study
        from rlt.schema import Compare
        from rlt.stages import run_stage

        if config.check:
            return
        folder = Path(str(config.hydra.sweep.dir))
        try:
            _, arms, _ = read_study([str(folder)], None, self.evaluations)
            known = self.reference in [arm.name for arm in arms]
            cfg = OmegaConf.structured(
                Compare(
                    stage="compare",
                    runs=[str(folder)],
                    reference=self.reference if known else None,
                    evaluations=self.evaluations,
                    title=self.title,
                )
            )
            run_stage(cfg, folder / "compare")
        except (ValueError, FileNotFoundError) as error:
            log.warning("the jobs were not compared: %s", error)
