"""What several stages share: loading models and data, and one training run."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rlt.config.build import build, build_partial
from rlt.data.dataset import DataSplit, ProblemData
from rlt.data.renderer import Renderer
from rlt.llm.model_sources import source_at
from rlt.llm.models import LanguageModel, context_tokens, save_model
from rlt.runs.environment import peak_memory_bytes
from rlt.runs.files import read_json, write_json
from rlt.runs.folder import RunFolder
from rlt.runs.signals import Terminated
from rlt.training import Example
from rlt.training.policy import PolicyModule

log = logging.getLogger(__name__)

# What code adds to the callbacks of the config, in a process of its own.
ADDED_CALLBACKS: list[L.Callback] = []
FIRST_LOOK = 64  # problems tokenised before any weights are loaded


def source_of(cfg: DictConfig, role: str) -> Any:
    """The model source of `teacher` or `student`, at the path the config gives, if any.

    Raises:
        FileNotFoundError: the path is no folder (it is never taken for a hub id).
    """
    path = cfg.get(f"{role}_path")
    if path is not None and not Path(path).is_dir():
        raise FileNotFoundError(f"{role}_path={path}: no such folder; give <run>/model")
    return source_at(build(cfg[role]), path)


def load_model(cfg: DictConfig, role: str) -> LanguageModel:
    source = source_of(cfg, role)
    log.info("loading the %s: %s", role, getattr(source, "path", type(source).__name__))
    return source.load()


def load_renderer(cfg: DictConfig, role: str) -> Renderer:
    """Prompt style and tokenizer; reads no weights."""
    return Renderer(build(cfg.prompt), source_of(cfg, role).tokenizer())


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


def fit_sft(
    cfg: DictConfig,
    run: RunFolder,
    role: str,
    renderer: Renderer,
    train_examples: list[Example],
    validation_examples: list[Example],
    answer_accuracy: Callable[[Any], float] | None = None,
) -> dict[str, float]:
    """Fine-tune the model of a role on examples and save it."""
    datamodule = build(
        cfg.datamodule, train=train_examples, validation=validation_examples, seed=cfg.seed
    )
    language_model = load_model(cfg, role)
    check_lengths(train_examples + validation_examples, context_tokens(language_model.model))
    module = build(
        cfg.module,
        policy=language_model.model,
        renderer=renderer,
        optim=build_partial(cfg.optim),
        schedule=build_partial(cfg.schedule),
        optimizer_steps=datamodule.steps,
        gradient_checkpointing=cfg.hardware.gradient_checkpointing,
        answer_accuracy=answer_accuracy,
    )
    return train(cfg, run, module, datamodule, make_logger(cfg, run.folder))


def check_lengths(examples: Sequence[Example], context: int) -> None:
    """Raises ValueError when an example is longer than the model's context."""
    longest = max(len(e.prompt) + len(e.target) for e in examples)
    if longest > context:
        raise ValueError(
            f"the longest example has {longest} tokens, the model's context holds "
            f"{context}; lower data.max_tokens"
        )


def train(
    cfg: DictConfig, run: RunFolder, module: PolicyModule, datamodule: Any, logger: Any
) -> dict[str, float]:
    """Validate, fit (from the newest whole checkpoint if there is one), validate, save the model.

    Returns:
        Final metrics: the validation before training under `start/`, the last training values, and
        the validation after it.
    """
    from rlt.training.callbacks import Checkpoint
    from rlt.training.checkpoints import CHECKPOINTS, newest_whole

    folder = run.folder
    callbacks = [build(node) for node in (cfg.callbacks or {}).values() if node]
    callbacks += ADDED_CALLBACKS
    interval = min(cfg.trainer.val_check_interval, datamodule.steps)
    node = cfg.trainer.copy()
    node.val_check_interval = interval
    if not datamodule.validation:
        node.limit_val_batches = 0  # Lightning warns of a loader without batches
    trainer = build(node, default_root_dir=str(folder), logger=logger or False, callbacks=callbacks)
    if trainer.world_size > 1:
        raise ValueError(
            f"hardware.devices={cfg.hardware.devices}, num_nodes={cfg.hardware.num_nodes}: "
            "training on several devices is not supported yet, as nothing divides a batch among "
            "them; choose a hardware profile of one device"
        )
    checkpoint = newest_whole(folder / CHECKPOINTS)
    start_file = folder / "start.json"

    def validate() -> dict[str, float]:
        found = trainer.validate(module, datamodule=datamodule, verbose=False, weights_only=True)
        return dict(found[0])

    held_out = len(datamodule.validation) > 0
    if held_out and not start_file.is_file():
        write_json(start_file, validate())
    if checkpoint is not None:
        log.info("resuming from %s", checkpoint.name)
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
    except SIGTERMException as stop:
        # Python discards an exception that a signal handler raises while C code calls back;
        # Lightning has noted the signal all the same.
        raise Terminated from stop
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    if held_out:
        if datamodule.steps % interval or not any(k.startswith("validation/") for k in metrics):
            metrics |= validate()  # else the last step has just been validated
        metrics |= {f"start/{k}": v for k, v in read_json(start_file).items()}
    # Resumed after the very last step, nothing was trained on: the checkpoint has its values.
    restored = next((c.metrics for c in callbacks if isinstance(c, Checkpoint)), {})
    metrics = restored | metrics
    metrics["resources/peak_memory_bytes"] = float(peak_memory_bytes())
    save_model(module.policy, module.renderer.tokenizer, folder / "model")
    run.record(tags=module.renderer.style.tags)
    return metrics


def make_logger(cfg: DictConfig, folder: Path) -> Any:
    """The config's Lightning logger, writing into a run folder; None if there is none."""
    return build(cfg.logger, save_dir=str(folder)) if cfg.logger else None


def log_scalars(cfg: DictConfig, folder: Path, metrics: dict[str, float]) -> None:
    """Final metrics of a stage without a Trainer, as events."""
    logger = make_logger(cfg, folder)
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
    interruption gives the very rows that an uninterrupted run gives.
    """
    done = list(_whole_batches(file))
    rows = [row for batch in done for row in batch]
    starts = range(0, len(items), size)
    with progress() as bar, file.open("a", encoding="utf-8") as out:
        task = bar.add_task(describe, total=len(items), completed=min(len(done) * size, len(items)))
        for number, start in enumerate(starts):
            if number < len(done):
                continue
            torch.manual_seed(seed * 1_000_003 + number)
            started = time.perf_counter()
            batch = work(list(items[start : start + size]))
            log.debug("batch %d took %.4f seconds", number, time.perf_counter() - started)
            out.write(json.dumps(batch, ensure_ascii=False) + "\n")
            out.flush()
            rows += batch
            bar.update(task, advance=min(size, len(items) - start))
    return rows


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
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(),
    )  # fmt: skip
