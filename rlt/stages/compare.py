"""`rlt stage=compare`: runs side by side, with intervals over seeds or questions.

    rlt stage=compare 'runs=[outputs/a, outputs/b]'                 two evaluations or pipelines
    rlt stage=compare 'runs=[outputs/claim_nano]' reference=RLT     a whole sweep

Loads no model: it reads what the runs left, and may be run again while a sweep still goes on.
"""

from omegaconf import DictConfig

from rlt.report.study import read_study
from rlt.run_folder import RunFolder


def run(cfg: DictConfig, run: RunFolder) -> dict[str, float]:
    jobs, arms, _ = read_study(cfg.runs, cfg.reference, cfg.evaluations)
    run.record(runs=[str(job.run.folder) for job in jobs])
    metrics = {
        f"compare/{arm.name}/accuracy{end}": value
        for arm in arms
        for end, value in zip(("", "_low", "_high"), arm.accuracy, strict=True)
    }
    metrics["compare/jobs"] = float(len(jobs))
    metrics["compare/unfinished_jobs"] = float(sum(not job.finished for job in jobs))
    return metrics
