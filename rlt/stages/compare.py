"""`rlt stage=compare`: runs side by side, with intervals over seeds or questions.

    rlt stage=compare 'runs=[outputs/a, outputs/b]'                 two evaluations or pipelines
    rlt stage=compare 'runs=[outputs/claim_nano]' reference=RLT     a whole sweep
    rlt stage=compare 'runs=[outputs/rates]' metric=validation/reward direction=maximize

Loads no model: it reads what the runs left, and may be run again while a sweep still goes on.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rlt.runs.folder import RunFolder
from rlt.stages.stage import Inputs, Stage
from rlt.sweeps.page import print_study, write_study_report
from rlt.sweeps.study import Measure, Study, read_study


@dataclass(kw_only=True)
class Compare(Stage):
    """Compares runs, or the jobs of a sweep, by their evaluations or by one final metric.

    Attributes:
        runs: run folders, or folders of them.
        reference: name of the arm that the others are compared with; None takes the first.
        evaluations: which evaluations of a pipeline: `last` or `all`.
        metric, direction: a final metric to rank by, and whether to `maximize` or `minimize` it.
        title: of the page.
    """

    runs: list[str]
    reference: str | None
    evaluations: str
    metric: str | None
    direction: str | None
    title: str | None

    name: ClassVar[str] = "compare"
    walked_again: ClassVar[bool] = True
    writes_own_report: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.measure = Measure(self.metric, self.direction)

    def study(self) -> Study:
        """The runs as arms and seeds.

        Raises:
            ValueError: there is nothing to compare, or no such reference.
        """
        return read_study(self.runs, self.reference, self.evaluations, self.measure)

    def run(self, run: RunFolder) -> dict[str, float]:
        study = self.study()
        run.record(runs=[str(job.run.folder) for job in study.jobs])
        write_study_report(run.folder, study)
        name = "accuracy" if self.metric is None else "mean"
        metrics = {
            f"compare/{arm.name}/{name}{end}": value
            for arm in study.arms
            for end, value in zip(("", "_low", "_high"), arm.interval, strict=True)
            if not math.isnan(value)
        }
        metrics["compare/jobs"] = float(len(study.jobs))
        metrics["compare/unfinished_jobs"] = float(sum(not job.finished for job in study.jobs))
        return metrics

    @staticmethod
    def write_report(folder: Path) -> None:
        """Nothing is left to write: `run` wrote the page when it read the runs that it compares."""

    @staticmethod
    def print_result(folder: Path, brief: bool = False) -> None:
        """Print the ranking, and what separates each arm from the reference."""
        print_study(folder)

    def look(self) -> Inputs:
        """What would be compared."""
        study = self.study()
        done = sum(job.finished for job in study.jobs)
        return Inputs(None, [], f"{done} finished of {len(study.jobs)} runs")

    def does(self, inputs: Inputs) -> list[str]:
        study = self.study()
        return [f"{len(study.arms)} arms, each against {study.reference.name}"]
