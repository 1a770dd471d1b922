"""A verifier in a process that can be killed. It starts when needed, and again after a kill.

math-verify guards itself with SIGALRM, which does nothing off the main thread and cannot interrupt
one long multiplication (`9^{9^{9^9}}`), whereas a process can be killed whatever it does.

A pool of pebble or multiprocessing cannot take its place: its spawned workers import the caller's
`__main__` and modules of the current folder, and the caller unpickles what they send. An answer
that takes over its worker could then run code in the caller. Here both sides speak JSON lines.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from typing import Any

from rlt import PACKAGE_DIR
from rlt.evaluation.verifiers import Verification

_START_SECONDS = 120.0
_THREAD_LIMITS = tuple(f"{name}_NUM_THREADS" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR"))


class VerifierTimeoutError(Exception):
    """The worker took longer than its time limit and was killed."""


class VerifierError(Exception):
    """The worker raised on this input, died of it, or sent something that is no reply."""


class Sandbox:
    """One persistent worker for one function of `rlt.evaluation.verifiers.FUNCTIONS`.

    Args:
        function: the name of the function.
        timeout_seconds: how long one call may take, in seconds.
        memory_mb: how much memory the calls may take beyond that of the imports, in MiB.

    Raises:
        ValueError: a limit is out of its range.
    """

    def __init__(self, function: str, timeout_seconds: float = 5.0, memory_mb: int = 1024) -> None:
        if timeout_seconds <= 0:
            raise ValueError(f"timeout_seconds is {timeout_seconds}, must be positive, such as 5")
        if memory_mb < 16:
            raise ValueError(f"memory_mb is {memory_mb}, must be at least 16, such as 1024")
        self.function = function
        self.timeout_seconds = float(timeout_seconds)
        self.memory_mb = int(memory_mb)
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize[..., Sandbox] | None = None
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The worker's process id, or None while no worker runs."""
        return None if self._process is None else self._process.pid

    def call(self, **arguments: Any) -> Verification:
        """Run the function on the arguments. The next call works whatever this one raises.

        Raises:
            VerifierTimeoutError: the time was up.
            VerifierError: the function raised, or the worker died or sent no proper reply.
            RuntimeError: the worker did not start.
        """
        with self._lock:
            fresh = self._process is None
            try:
                return self._verify(arguments)
            except VerifierError as error:
                if fresh or not str(error).startswith("MemoryError"):
                    raise
                self._stop()  # earlier answers may have filled the memory: try once in a new worker
                return self._verify(arguments)

    def close(self) -> None:
        """End the worker. The next call starts a new one."""
        with self._lock:
            self._stop()

    def _verify(self, arguments: dict[str, Any]) -> Verification:
        if self._process is None:
            self._start()
        reply = self._exchange(json.dumps(arguments).encode() + b"\n", self.timeout_seconds)
        match reply:
            case {"result": {"score": float(), "extracted": str(), "reason": str()}}:
                verification: Verification = reply["result"]
                return verification
            case {"error": str(error)}:
                raise VerifierError(error)
        self._stop()  # the answer wrote to the pipe: what follows there is no reply either
        raise VerifierError(f"the worker sent {str(reply)[:80]!r}, which is no reply")

    def _start(self) -> None:
        # One thread each: thread pools reserve address space, and the cores are for the models.
        environment = os.environ | dict.fromkeys(_THREAD_LIMITS, "1")
        paths = [str(PACKAGE_DIR.parent), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        command = [sys.executable, "-P", "-m", "rlt.evaluation.worker", self.function]
        self._process = subprocess.Popen(
            [*command, str(self.memory_mb), str(self.timeout_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the parent, which ends the worker in order
        )
        self._finalizer = weakref.finalize(self, _end, self._process)
        try:
            reply = self._exchange(b"", _START_SECONDS)
        except (VerifierTimeoutError, VerifierError) as error:
            raise RuntimeError(
                f"the grading worker did not start: {error}; free memory and cores of this machine"
            ) from error
        if reply != {"ready": True}:
            self._stop()
            raise RuntimeError(
                f"the grading worker did not start: {reply}; "
                "install the packages that this benchmark's grader needs"
            )

    def _stop(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._process, self._finalizer = None, None

    def _exchange(self, request: bytes, timeout_seconds: float) -> Any:
        """Write the request, if any, and read one line of JSON. End a worker that fails in this."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        timed_out = threading.Event()

        def kill() -> None:
            timed_out.set()
            process.kill()

        clock = threading.Timer(timeout_seconds, kill)
        clock.daemon = True
        clock.start()
        line = b""
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(request)
                process.stdin.flush()
                line = process.stdout.readline()
        except BaseException:  # Ctrl-C between request and reply: the two are out of step
            self._stop()
            raise
        finally:
            clock.cancel()
            clock.join()  # once it has ended, it kills no more
        if timed_out.is_set():
            self._stop()
            raise VerifierTimeoutError(f"no result within {timeout_seconds:g} s")
        if not line:
            self._stop()
            raise VerifierError(f"the worker died (exit code {process.returncode})")
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            return line


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill the process, wait for it and close its pipes, so that no zombie and no pipe stays."""
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
