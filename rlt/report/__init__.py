"""What a person reads after a run: report.md with curves, sample texts, the final table."""

from rlt.report.events import read_scalars
from rlt.report.pipeline import write_pipeline_report
from rlt.report.run import write_report
from rlt.report.samples import SampleWriter, log_samples
from rlt.report.table import print_table

__all__ = [
    "SampleWriter",
    "log_samples",
    "print_table",
    "read_scalars",
    "write_pipeline_report",
    "write_report",
]
