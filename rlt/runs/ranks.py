"""The processes that share a run: one for each device, each of them a rank.

Every rank walks through the same run with a whole copy of the models. Work is divided by items
(problems, rows, batches), and what comes of it is gathered on every rank, so that all that follows
is computed alike everywhere. Rank 0 alone writes. A process by itself is rank 0 of 1, and nothing
here does anything.

Where ranks meet, each tells the others whether its own work has failed. So no rank waits for one
that has stopped, and a rank that does not answer is named after a time limit.
"""

import contextlib
import datetime
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

# torch is imported where it is used: the command line asks who writes before torch is loaded.

Result = TypeVar("Result")
Item = TypeVar("Item")

# How long ranks wait for each other; longer than any phase of a step takes.
TIME_LIMIT = "RLT_RANK_TIME_LIMIT"  # environment variable, in seconds
_DEFAULT_TIME_LIMIT = 1800.0
_BLOCK_ELEMENTS = 2**24  # summed at once, at most


class RankStoppedError(RuntimeError):
    """Another rank has failed, has gone, or does not answer."""


class _Group:
    """The group in which ranks tell each other what they have done; None before `join`."""

    control: Any = None
    rank: int = 0
    size: int = 1
    phase: str = "starting"


def devices_of(hardware: Any) -> int:
    """Number of devices on this machine that a hardware config asks for.

    Raises:
        ValueError: `devices` is neither a number above 0, nor a list, nor auto.
    """
    devices = hardware.devices
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if isinstance(devices, int) and devices > 0:
        return devices
    if devices in ("auto", -1):
        import torch

        on_gpus = hardware.accelerator != "cpu" and torch.cuda.is_available()
        return torch.cuda.device_count() if on_gpus else 1
    if isinstance(devices, int | str) or not devices:
        raise ValueError(
            f"hardware.devices={devices}: give the number of devices, a list such as [0,1], or auto"
        )
    return len(devices)


def join(rank: int, world_size: int, backend: str) -> None:
    """Make this process one of a group of ranks. `MASTER_ADDR` and `MASTER_PORT` name the first.

    Args:
        rank: of this process, from 0.
        world_size: number of processes.
        backend: that gradients are summed by: `gloo` or `nccl`.
    """
    limit = datetime.timedelta(seconds=time_limit())
    import torch.distributed as dist

    with _as_stopped():
        if not dist.is_initialized():
            dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=limit)
        _Group.control = dist.new_group(backend="gloo", timeout=limit)
    _Group.rank, _Group.size = rank, world_size


def leave() -> None:
    """End this process's part in the group."""
    import torch.distributed as dist

    if dist.is_initialized():
        _Group.control, _Group.rank, _Group.size = None, 0, 1
        dist.destroy_process_group()


def time_limit() -> float:
    """Seconds that ranks wait for each other.

    Raises:
        ValueError: the environment variable is no positive number.
    """
    told = os.environ.get(TIME_LIMIT, str(_DEFAULT_TIME_LIMIT))
    try:
        seconds = float(told)
    except ValueError:
        seconds = 0.0
    if seconds <= 0:
        raise ValueError(f"{TIME_LIMIT}={told}: give the seconds that ranks wait for each other")
    return seconds


def world_size() -> int:
    """Number of ranks."""
    return _Group.size


def rank() -> int:
    """This process's rank, from 0."""
    return _Group.rank


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def own_part(count: int) -> range:
    """Places of the items that are this rank's, of `count` items; ranks' parts are in order."""
    size = world_size()
    return range(rank() * count // size, (rank() + 1) * count // size)


def gather(work: Callable[[], Result], phase: str) -> list[Result]:
    """Do some work and return what it gave on every rank, in the order of ranks.

    Args:
        work: this rank's part; the others get a copy of what it returns, by pickling.
        phase: what the work is, for messages.

    Raises:
        RankStoppedError: the work failed on another rank, or a rank has gone or does not answer.
            An error of this rank's own work is raised as it is.
    """
    if _Group.control is None:
        return [work()]
    import torch.distributed as dist

    _Group.phase = phase
    error: Exception | None = None
    result: Result | None = None
    try:
        result = work()
    except Exception as caught:
        error = caught
    told = None if error is None else f"{type(error).__name__}: {error}"
    outcomes: list[Any] = [None] * world_size()
    _meet()
    with _as_stopped():
        dist.all_gather_object(outcomes, (told, result), group=_Group.control)
    if error is not None:
        raise error
    for place, (failure, _) in enumerate(outcomes):
        if failure is not None:
            raise RankStoppedError(f"rank {place} stopped while {phase}: {failure}")
    outcomes[rank()] = None, result
    return [value for _, value in outcomes]


def gather_parts(work: Callable[[], Sequence[Item]], phase: str) -> list[Item]:
    """As `gather`, for parts of a list: the whole list."""
    return [item for part in gather(work, phase) for item in part]


def from_main(work: Callable[[], Result], phase: str) -> Result:
    """What some work gives on rank 0, which alone does it."""
    return gather(lambda: work() if is_main() else None, phase)[0]  # type: ignore[return-value]


def add_up(tensors: "Iterable[Tensor]", phase: str) -> None:
    """Put in place of each tensor its sum over ranks.

    Every rank gives tensors of the same shapes. They are summed in blocks, so that many small ones
    cost one exchange.

    Raises:
        RankStoppedError: a rank has gone or does not answer.
    """
    if _Group.control is None:
        return
    import torch
    import torch.distributed as dist

    _Group.phase = phase
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    with _as_stopped():
        for same in groups.values():
            for block in _blocks(same):
                flat = torch.cat([tensor.reshape(-1) for tensor in block])
                dist.all_reduce(flat)
                for tensor, summed in zip(
                    block, flat.split([t.numel() for t in block]), strict=True
                ):
                    tensor.copy_(summed.view_as(tensor))


@contextlib.contextmanager
def own_random_numbers() -> Iterator[None]:
    """Random numbers of this rank's own, after which all ranks go on with the same ones.

    What ranks draw differently (dropout) must not set their random numbers apart.
    """
    if _Group.control is None:
        yield
        return
    import torch

    # The same on every rank, and drawn from nothing, so that one process draws the same afterwards.
    state = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).digest()
    seed = int.from_bytes(state[:7], "big")
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed + rank())
        yield


def _blocks(tensors: "Sequence[Tensor]") -> "Iterator[list[Tensor]]":
    block: list[Tensor] = []
    for tensor in tensors:
        if block and sum(t.numel() for t in block) + tensor.numel() > _BLOCK_ELEMENTS:
            yield block
            block = []
        block.append(tensor)
    if block:
        yield block


def _meet() -> None:
    """Wait for all ranks; rank 0 names those that do not come."""
    import torch.distributed as dist

    limit = datetime.timedelta(seconds=time_limit())
    with _as_stopped():
        dist.monitored_barrier(_Group.control, timeout=limit, wait_all_ranks=True)


@contextlib.contextmanager
def _as_stopped() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise RankStoppedError(
            f"rank {rank()} waits for the others while {_Group.phase}, and one of them has gone or "
            f"has not answered for {time_limit():.0f} s ({TIME_LIMIT}): {reason}"
        ) from error
