"""`rlt stage=compare`: runs side by side, with intervals over seeds or questions.

    rlt stage=compare 'runs=[outputs/a, outputs/b]'                 two evaluations or pipelines
    rlt stage=compare 'runs=[outputs/claim_nano]' reference=RLT     a whole sweep
    rlt stage=compare 'runs=[outputs/rates]' metric=validation/reward direction=maximize

Loads no model: it reads what the runs left, and may be run again while a sweep still goes on.
"""

import math

from omegaconf import DictConfig

from rlt.report.study import Measure, read_study
from rlt.report.study_page import write_study_report
from rlt.runs.folder import RunFolder


def run(cfg: DictConfig, run: RunFolder) -> dict[str, float]:
    measure = Measure(cfg.metric, cfg.direction)
    study = read_study(cfg.runs, cfg.reference, cfg.evaluations, measure)
    run.record(runs=[str(job.run.folder) for job in study.jobs])
    write_study_report(run.folder, study)
    name = "accuracy" if cfg.metric is None else "mean"
    metrics = {
        f"compare/{arm.name}/{name}{end}": value
        for arm in study.arms
        for end, value in zip(("", "_low", "_high"), arm.interval, strict=True)
        if not math.isnan(value)
    }
    metrics["compare/jobs"] = float(len(study.jobs))
    metrics["compare/unfinished_jobs"] = float(sum(not job.finished for job in study.jobs))
    return metrics
