"""SIGTERM ends a run as Ctrl-C does: at once, and with everything kept that it has made."""

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
    """The process has received SIGTERM."""


@contextmanager
def terminable() -> Iterator[None]:
    """Raise `Terminated` inside the context on SIGTERM; further SIGTERMs are ignored."""

    def stop(signum: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_status(stop: BaseException) -> int | None:
    """Return 143 after SIGTERM, 130 after Ctrl-C and None after anything else.

    Lightning and the steps of a pipeline turn both into a SystemExit, whose context is the original
    exception.
    """
    found: BaseException | None = stop
    while isinstance(found, SystemExit):
        found = found.__context__
    while isinstance(found, Exception):  # C code that was interrupted wraps what stopped it
        found = found.__cause__
    if isinstance(found, KeyboardInterrupt):
        return TERMINATED if isinstance(found, Terminated) else INTERRUPTED
    return None


def end_with(parent: int) -> None:
    """Have Linux send SIGTERM to this process when its parent dies, even by SIGKILL.

    Args:
        parent: process id of the parent.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # the parent died before the call above
            os.kill(os.getpid(), signal.SIGTERM)
