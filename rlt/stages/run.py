"""Runs a stage in its folder: claimed, gone on with where it stopped, its end written down."""

import contextlib
import errno
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from rlt.config.build import build_stage
from rlt.llm.device import Hardware
from rlt.llm.token_budget import OutOfMemoryError, is_out_of_memory
from rlt.runs import ranks
from rlt.runs.folder import RunFolder, RunRefusedError
from rlt.runs.identity import config_key
from rlt.runs.rank_folder import claim
from rlt.runs.signals import exit_status
from rlt.stages.stage import Stage
from rlt.stages.steps import code_digest, input_fingerprints

log = logging.getLogger(__name__)


def run_stage(
    cfg: DictConfig,
    run_dir: Path,
    key: str | None = None,
    metadata: dict[str, Any] | None = None,
    stage: Stage | None = None,
) -> dict[str, float]:
    """Run one stage in its folder: from the start, from where it stopped, or not again.

    Args:
        key: identity of the run's config and inputs, if it is a step of a pipeline; made from the
            config if None.
        metadata: how the run was asked for, for its manifest.
        stage: the config's stage, if it is built already.

    Raises:
        ConfigError: the config is refused; everything that is wrong with it.
        SystemExit: it was interrupted (130) or terminated (143); what it made is kept.
    """
    if stage is None:
        stage = build_stage(cfg)
    hardware = getattr(stage, "hardware", None)
    if isinstance(hardware, Hardware):
        hardware.require_device()
        hardware.prepare()
    inputs: dict[str, str] = {}  # of a pipeline its steps have their own
    still_to_be_made = key is None or not (run_dir / "metrics.json").is_file()
    if still_to_be_made and not stage.walked_again:
        inputs = input_fingerprints(cfg)
    metadata = {"code": code_digest(), **(metadata or {})}
    with _in_one_line(run_dir):
        return _run_in(run_dir, cfg, stage, key, inputs, metadata)


def _run_in(
    run_dir: Path,
    cfg: DictConfig,
    stage: Stage,
    key: str | None,
    inputs: dict[str, str],
    metadata: dict[str, Any],
) -> dict[str, float]:
    """Claim the folder, run the stage unless it has finished, and tell the result."""
    run = claim(
        run_dir,
        cfg,
        key or config_key(cfg, inputs),
        inputs,
        metadata,
        walked_again=stage.walked_again,
        rewritten=stage.writes_own_report,
    )
    try:
        if run.status == "finished":
            log.info("already finished, nothing to do")
            metrics = run.metrics
        else:
            if run.status == "resumed" and not stage.writes_own_report:
                log.info("%s: going on where it stopped", run_dir)
            metrics = _run(stage, cfg, run, is_step=key is not None)

        def tell() -> None:
            if run.status != "finished" or not (run_dir / "report.md").is_file():
                stage.write_report(run_dir)
            stage.print_result(run_dir, brief=key is not None)

        ranks.from_main(tell, "writing the report")
    finally:
        run.release()
    return metrics


def _run(stage: Stage, cfg: DictConfig, run: RunFolder, is_step: bool) -> dict[str, float]:
    """Run a stage in its claimed folder and write down how it ended."""
    import lightning as L

    from rlt.preflight.budget import settle_token_budget  # it imports the stages

    L.seed_everything(stage.seed, verbose=False)
    try:
        settle_token_budget(cfg, stage, run)
        metrics = stage.run(run)
        ranks.from_main(lambda: run.finish(metrics), "finishing")
    except RunRefusedError:
        run.take_back()
        raise
    except BaseException as stop:
        status = exit_status(stop)
        if status is None:
            if isinstance(stop, Exception):
                with contextlib.suppress(OSError):  # a disk that is full takes no manifest either
                    run.record(status="failed", error=f"{type(stop).__name__}: {stop}")
            raise
        run.record(status="interrupted")
        if not is_step and ranks.is_main():
            print(
                f"\nInterrupted. This goes on from here:  rlt resume {run.folder}\n"
                f"(as does the same command with output_dir={run.folder})",
                flush=True,
            )
        raise SystemExit(status) from stop
    return metrics


@contextlib.contextmanager
def _in_one_line(run_dir: Path) -> Iterator[None]:
    """No room on the disk or in memory is for the user to mend."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise ValueError(
                f"no space is left where {run_dir} lies ({error}): make room; the same command "
                "then goes on"
            ) from error
        if is_out_of_memory(error):
            raise OutOfMemoryError(
                f"not enough memory ({str(error).splitlines()[0]}): choose a smaller model, or "
                "another hardware profile (hardware=…)"
            ) from error
        raise
