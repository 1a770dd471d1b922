"""Reports for people: report.md with curves and sample texts, and the result in the terminal."""

from pathlib import Path

from rlt.report.card import write_model_card
from rlt.report.events import read_scalars
from rlt.report.folder import read_json_list
from rlt.report.pipeline import write_pipeline_report
from rlt.report.run import write_report
from rlt.report.samples import HELD_OUT_FILE, SampleWriter, StepRows, log_samples
from rlt.report.table import print_run, print_table

__all__ = [
    "HELD_OUT_FILE",
    "SampleWriter",
    "StepRows",
    "log_samples",
    "print_result",
    "print_run",
    "print_table",
    "read_scalars",
    "write_pipeline_report",
    "write_report",
    "write_result",
]

_STEPS_FILE = "steps.json"  # what tells a pipeline's run folder from a stage's


def write_result(run_dir: Path) -> Path:
    """Write report.md of a finished stage or pipeline, and the card of its model."""
    write_model_card(run_dir)
    is_pipeline = (run_dir / _STEPS_FILE).is_file()
    return write_pipeline_report(run_dir) if is_pipeline else write_report(run_dir)


def print_result(run_dir: Path, brief: bool = False) -> None:
    """Print the result of a finished stage or pipeline.

    Args:
        brief: print sentences only, without metrics and paths, as for a step of a pipeline.
    """
    steps = run_dir / _STEPS_FILE
    if steps.is_file():
        print_table(read_json_list(steps), run_dir)
    else:
        print_run(run_dir, brief=brief)
