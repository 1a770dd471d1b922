"""Starts the ranks of a run on several devices: one process for each, all with the composed config.

The command line is not run again, so this works within a sweep too. Under torchrun or srun, which
have started the ranks already, it starts none.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlt import PACKAGE_DIR
from rlt.runs import ranks
from rlt.runs.files import read_json, write_json
from rlt.runs.signals import INTERRUPTED, TERMINATED, Terminated

_SECONDS_TO_STOP = 60  # before a rank that does not end is killed


class RanksFailedError(ValueError):
    """A rank has failed or was killed, and the others have been ended."""


def launched() -> bool:
    """Whether this process is a rank that torchrun, srun or `run_ranks` has started."""
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return True
    return _by_srun()


def _by_srun() -> bool:
    if int(os.environ.get("SLURM_NTASKS", "1")) < 2 or "SLURM_PROCID" not in os.environ:
        return False
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    return SLURMEnvironment.detect()


def refuse_sweep() -> None:
    """Raises ValueError where a rank is asked for a sweep: each rank would run all jobs."""
    if launched():
        raise ValueError(
            "a sweep starts the ranks of its jobs itself: run it without torchrun or srun, or give "
            "them one job at a time"
        )


def join_ranks(hardware: Any) -> None:
    """Make this process, which `launched` tells to be a rank, one of its group.

    Args:
        hardware: the config's.
    """
    if "RANK" in os.environ:
        place, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local = int(os.environ.get("LOCAL_RANK", "0"))
    else:
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        slurm = SLURMEnvironment()
        place, size, local = slurm.global_rank(), slurm.world_size(), slurm.local_rank()
        os.environ["MASTER_ADDR"] = slurm.main_address
        os.environ["MASTER_PORT"] = str(slurm.main_port)
    import torch

    on_gpu = hardware.accelerator != "cpu" and torch.cuda.is_available()
    if on_gpu:
        listed = not isinstance(hardware.devices, int | str)
        torch.cuda.set_device(hardware.devices[local] if listed else local)
    ranks.join(place, size, "nccl" if on_gpu else "gloo")
    if place > 0:  # what all ranks would say alike is said once
        logging.getLogger().setLevel(logging.ERROR)


def run_ranks(
    cfg: DictConfig, run_dir: Path, metadata: Mapping[str, Any] | None, count: int
) -> dict[str, float]:
    """Run a config on several ranks of this machine, by torch's elastic launcher.

    Returns:
        The final metrics.

    Raises:
        RanksFailedError: a rank failed or was killed.
        KeyboardInterrupt: this process was interrupted or terminated, and so were the ranks.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    _share_threads(count)
    paths = [str(PACKAGE_DIR.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    with tempfile.TemporaryDirectory(prefix="rlt-ranks-") as folder:
        config = Path(folder) / "config.yaml"
        OmegaConf.save(cfg, config)
        write_json(config.with_name("metadata.json"), dict(metadata or {}))
        launch = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=config.parent.name,
            rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.2,
            logs_specs=DefaultLogsSpecs(log_dir=folder), shutdown_timeout=_SECONDS_TO_STOP,
        )  # fmt: skip
        command = ["-P", "-m", "rlt.cli.worker", str(config), str(run_dir), str(os.getpid())]
        try:
            elastic_launch(launch, entrypoint=sys.executable)(*command)
        except SignalException as stop:
            raise (KeyboardInterrupt if stop.sigval.name == "SIGINT" else Terminated) from None
        except ChildFailedError as error:
            place, failure = error.get_first_failure()
            result = config.with_name("result.json")
            told = read_json(result).get("error") if result.is_file() else None
            if failure.exitcode in (INTERRUPTED, TERMINATED):
                raise Terminated from None
            raise RanksFailedError(
                told
                or f"rank {place} ended with {_ending(failure.exitcode)}; its last output "
                "stands above"
            ) from None
        return dict(read_json(config.with_name("result.json"))["metrics"])


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit status {code}"


def _share_threads(count: int) -> None:
    """Give each rank its share of the cores, unless the user has said how many threads to take."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // count)))
