"""The records of single texts and problems that RL writes while it runs.

Sample explanations go to TensorBoard as text and to samples.jsonl as rows. The reward of every
held-out problem goes to held_out_rewards.jsonl, for paired comparisons.

`rlt stage=teacher_rl module.samples_per_step=4` writes more of them.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlt.report.attribution import attribution_figure
from rlt.report.folder import read_jsonl
from rlt.report.text import sample_text
from rlt.runs import ranks

SAMPLES_FILE = "samples.jsonl"
HELD_OUT_FILE = "held_out_rewards.jsonl"
_STEPS_PER_PICTURE = 10  # drawing takes a tenth of a second


def log_samples(logger: Any, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Show samples, best reward first, in the text tab of TensorBoard.

    Args:
        logger: a Lightning TensorBoardLogger; None logs nothing.
    """
    if logger and rows:
        logger.experiment.add_text("samples", samples_markdown(rows), global_step=step)
        if step % _STEPS_PER_PICTURE == 0:
            best = max(rows, key=lambda row: float(row["reward"]))
            log_attributions(logger, [best], step)


def log_attributions(logger: Any, rows: Sequence[Mapping[str, Any]], step: int = 0) -> None:
    """Show as pictures which tokens made the reward of each row."""
    for place, row in enumerate(rows):
        if logger and row.get("attribution"):
            figure = attribution_figure(row)
            logger.experiment.add_figure(f"attribution/{place}", figure, global_step=step)


def samples_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the samples as Markdown, the highest reward first."""
    ordered = sorted(rows, key=lambda row: -float(row["reward"]))
    return "\n\n---\n\n".join(
        f"#### {place} of {len(ordered)} by reward\n\n{sample_text(row)}"
        for place, row in enumerate(ordered, start=1)
    )


class StepRows:
    """Rows of ascending steps in a JSONL file.

    An interrupted run may have written rows after its last checkpoint. The first call drops the
    rows of its own step and of later steps, so that a resumed run has each step once.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._begun = False

    def __call__(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append the rows of one step, on rank 0; `step` is added to each of them."""
        if not ranks.is_main():
            return
        if not self._begun:
            self._drop_from(step)
            self._begun = True
        with self.file.open("a", encoding="utf-8") as out:
            out.writelines(_line({"step": step, **row}) for row in rows)

    def _drop_from(self, step: int) -> None:
        if not self.file.is_file():
            return
        kept = [row for row in read_jsonl(self.file) if row["step"] < step]
        temporary = self.file.with_name(self.file.name + ".tmp")
        temporary.write_text("".join(_line(row) for row in kept), encoding="utf-8")
        temporary.replace(self.file)


class SampleWriter:
    """The `on_samples` of `RL`: samples.jsonl and TensorBoard.

    Args:
        run_dir: gets samples.jsonl.
        logger: a Lightning TensorBoardLogger, or None.
    """

    def __init__(self, run_dir: Path, logger: Any = None) -> None:
        self.write = StepRows(run_dir / SAMPLES_FILE)
        self.logger = logger

    def __call__(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Append the samples of one step to samples.jsonl and show them in TensorBoard."""
        self.write(step, rows)
        log_samples(self.logger, step, rows)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
