"""What several stages share: loading models and data, and work in batches that can be resumed."""

import io
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rlt.data.dataset import DataSplit, ProblemData
from rlt.data.renderer import Renderer
from rlt.llm.model_sources import ModelSource
from rlt.llm.models import LanguageModel
from rlt.runs import ranks
from rlt.stages.stage import FIRST_LOOK

log = logging.getLogger(__name__)


def load(role: str, source: ModelSource) -> LanguageModel:
    """The model of a role, and a line that says so."""
    log.info("loading the %s: %s", role, getattr(source, "path", type(source).__name__))
    return source.load()


def load_data(data: ProblemData, renderer: Renderer) -> DataSplit:
    """Read, check and split the problems, before any weights are loaded."""
    split = data.load(forbidden=renderer.forbidden, count_tokens=renderer.count_tokens)
    with_system = sum(problem.system is not None for problem in split.train)
    if with_system and not renderer.style.system_from_data:
        log.info(
            "data: %d problems carry a system prompt of their own; it is not used "
            "(prompt.system_from_data=false)",
            with_system,
        )
    log.info(
        "data: %d training and %d validation problems of %d rows read",
        len(split.train), len(split.validation), split.report["read"],
    )  # fmt: skip
    for problem in split.train[:FIRST_LOOK]:  # a tokenizer that cannot read them is told here
        renderer.teacher_prompt(problem)
    return split


def same_tokenizer(a: Any, b: Any) -> bool:
    """Whether two tokenizers have the same vocabulary."""
    return bool(a.get_vocab() == b.get_vocab())


def require_same_tokenizer(teacher: Any, student: Any) -> None:
    """The explanation's token ids are taken over by the student as they are.

    Raises:
        ValueError: the vocabularies differ.
    """
    if not same_tokenizer(teacher, student):
        raise ValueError(
            "teacher and student have different tokenizers "
            f"({len(teacher)} and {len(student)} tokens): the reward compares their log-probs "
            "token by token. Choose a student of the teacher's family"
        )


def log_scalars(logger: Any, metrics: dict[str, float]) -> None:
    """Final metrics of a stage without a Trainer, as events; nothing without a logger."""
    if logger is not None:
        logger.log_metrics({k: v for k, v in metrics.items() if "resources" not in k}, step=0)
        logger.finalize("success")


def in_batches(
    items: Sequence[Any],
    size: int,
    file: Path,
    seed: int,
    describe: str,
    work: Callable[[list[Any]], list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """Work through items in batches, each batch's rows appended to `file` as soon as it is done.

    A batch's random numbers depend on `seed` and its number alone, so going on after an
    interruption gives the very rows that an uninterrupted run gives. Several ranks take batches in
    turn, and all get all rows.
    """
    done = ranks.from_main(lambda: list(_whole_batches(file)), describe)
    rows = [row for batch in done for row in batch]
    count = -(-len(items) // size)

    def batch(number: int) -> list[dict[str, Any]] | None:
        if number >= count:
            return None
        torch.manual_seed(seed * 1_000_003 + number)
        started = time.perf_counter()
        found = work(list(items[number * size : (number + 1) * size]))
        log.debug("batch %d took %.4f seconds", number, time.perf_counter() - started)
        return found

    with progress() as bar, _appending(file) as out:
        task = bar.add_task(describe, total=len(items), completed=min(len(done) * size, len(items)))
        for first in range(len(done), count, ranks.world_size()):
            found = ranks.gather(partial(batch, first + ranks.rank()), describe)
            for one in found:
                if one is not None:
                    out.write(json.dumps(one, ensure_ascii=False) + "\n")
                    rows += one
            out.flush()
            bar.update(task, completed=min((first + len(found)) * size, len(items)))
    return rows


def _appending(file: Path) -> TextIO:
    """The file, opened to append to it; on other ranks than the first, nothing is kept."""
    return file.open("a", encoding="utf-8") if ranks.is_main() else io.StringIO()


def _whole_batches(file: Path) -> Iterator[list[dict[str, Any]]]:
    """Batches written so far; a half-written last line is cut off the file."""
    if not file.is_file():
        return
    whole = 0
    with file.open("rb+") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            yield json.loads(line)
        lines.truncate(whole)


def progress() -> Progress:
    """A progress bar with count, elapsed time and estimated time of arrival."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(), disable=not ranks.is_main(),
    )  # fmt: skip
