"""SIGTERM ends a run as Ctrl-C does: at once, wherever it is, with what it has made kept."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTED = 128 + signal.SIGINT  # exit status of a program that Ctrl-C ended
TERMINATED = 128 + signal.SIGTERM
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Terminated(KeyboardInterrupt):
    """SIGTERM has come."""


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated` inside; a second one is ignored, as the first is being heeded."""

    def stop(signum: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_status(stop: BaseException) -> int | None:
    """143 after SIGTERM, 130 after Ctrl-C, None if it was neither.

    Lightning, and a pipeline's step, make a SystemExit of either; its context tells which.
    """
    found: BaseException | None = stop
    while isinstance(found, SystemExit):
        found = found.__context__
    if isinstance(found, KeyboardInterrupt):
        return TERMINATED if isinstance(found, Terminated) else INTERRUPTED
    return None


def end_with(parent: int) -> None:
    """Send this process SIGTERM when the one that started it dies, SIGKILL included (Linux).

    Args:
        parent: process id of the one that started it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before it was asked about
            os.kill(os.getpid(), signal.SIGTERM)
