"""The command line in forked processes: to the end, or killed at a chosen call or after a while.

They are forked from a server that has the libraries loaded, as most of a tiny run is their import.
"""

import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.cli import LIMIT_SECONDS

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["rlt.cli.main", "rlt.stages.teacher_rl", "rlt.stages.collect", "rlt.stages.distill",
     "rlt.stages.evaluate", "rlt.stages.pipeline", "rlt.training.callbacks", "rlt.report",
     "lightning.pytorch.loggers", "tensorboard", "matplotlib.pyplot", "rich.progress"]
)  # fmt: skip


class At(NamedTuple):
    """The `call`-th call (from 1) of a function: `module:Class.method`."""

    function: str
    call: int
    how: signal.Signals = signal.SIGKILL


def start(arguments: list[str], cwd: Path, at: At | None = None) -> Any:
    """Begin a run; its output goes to `<cwd>/output.txt`."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the server takes it over when it starts
    process = _SERVER.Process(target=_run, args=(arguments, cwd, at))
    process.start()
    return process


def finish(arguments: list[str], cwd: Path, at: At | None = None, status: int = 0) -> str:
    """Run to the end, or to where it is stopped, and return what was written."""
    process = start(arguments, cwd, at)
    process.join(LIMIT_SECONDS)
    output = (cwd / "output.txt").read_text()
    assert process.exitcode == status, f"exit status {process.exitcode}\n{output}"
    return output


def killed(arguments: list[str], cwd: Path, at: At) -> str:
    return finish(arguments, cwd, at, status=-at.how)


def killed_after(arguments: list[str], cwd: Path, seconds: float) -> bool:
    """Kill a run from outside; whether it had finished before."""
    process = start(arguments, cwd)
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), (cwd / "output.txt").read_text()
    return bool(process.exitcode == 0)


def _run(arguments: list[str], cwd: Path, at: At | None) -> None:
    from rlt.cli.main import main

    os.chdir(cwd)
    os.environ["COLUMNS"] = "200"
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["rlt", *arguments]
    if at is not None:
        _patch(at)
    main()


def _patch(at: At) -> None:
    module, _, path = at.function.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    function: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at.call:
            os.kill(os.getpid(), at.how)
        return function(*args, **kwargs)

    setattr(owner, name, wrapper)
