"""A verifier in a process that can be killed: started when first needed, restarted after a kill.

math-verify guards itself with SIGALRM, which does nothing off the main thread and cannot interrupt
one long multiplication (`9^{9^{9^9}}`); a process can be killed whatever it does. The protocol is
JSON lines, so that nothing of the parent (torch, weights, Hydra's `__main__`) is imported by the
child.
"""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from typing import IO, Any

from rlt import PACKAGE_DIR

_START_SECONDS = 120.0
_PACKAGE_ROOT = str(PACKAGE_DIR.parent)


class VerifierTimeoutError(Exception):
    """The worker took longer than its time limit and was killed."""


class VerifierError(Exception):
    """The worker raised, or died, on this input."""


def _end(process: "subprocess.Popen[bytes]", log: IO[bytes]) -> None:
    """Kill, reap and close: leaves neither a zombie nor an open pipe."""
    if process.poll() is None:
        process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, log):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


class Sandbox:
    """One persistent worker for one function of `rlt.evaluation.worker.FUNCTIONS`."""

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
        self._log: IO[bytes] | None = None
        self._unread = b""
        self._lock = threading.Lock()
        self._calls = 0

    @property
    def pid(self) -> int | None:
        """The worker's process id, None while none runs."""
        return None if self._process is None else self._process.pid

    def call(self, **arguments: Any) -> dict[str, Any]:
        """Run the function; after a VerifierTimeoutError or VerifierError it can go on."""
        with self._lock:
            fresh = self._calls == 0
            try:
                return self._call_once(arguments)
            except VerifierError as error:
                if fresh or not str(error).startswith("MemoryError"):
                    raise
                self._stop()  # what earlier answers left behind may be to blame: once more, afresh
                return self._call_once(arguments)

    def close(self) -> None:
        """End the worker; the next call starts a new one."""
        with self._lock:
            self._stop()

    def _call_once(self, arguments: dict[str, Any]) -> dict[str, Any]:
        if self._process is None:
            self._start()
        self._calls += 1
        reply = self._exchange(json.dumps(arguments).encode() + b"\n", self.timeout_seconds)
        if "error" in reply:
            raise VerifierError(reply["error"])
        result: dict[str, Any] = reply["result"]
        return result

    def _start(self) -> None:
        environment = dict(os.environ)
        paths = [_PACKAGE_ROOT, environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        # one thread each: pools of them reserve address space, and the cores are for the models
        for library in ("OMP", "OPENBLAS", "MKL", "NUMEXPR"):
            environment[f"{library}_NUM_THREADS"] = "1"
        command = [sys.executable, "-P", "-m", "rlt.evaluation.worker", self.function]
        log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the worker; `_end` closes it)
        process = subprocess.Popen(
            [*command, str(self.memory_mb), str(self.timeout_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the parent, which ends the worker in order
        )
        self._process, self._log, self._unread, self._calls = process, log, b"", 0
        self._finalizer = weakref.finalize(self, _end, process, log)
        try:
            reply = self._exchange(b"", _START_SECONDS)
        except (VerifierTimeoutError, VerifierError) as error:
            raise RuntimeError(f"the grading worker did not start: {error}") from error
        if not reply.get("ready"):
            self._stop()
            raise RuntimeError(
                f"the grading worker did not start: {reply.get('error')}; "
                "install the packages that this benchmark's grader needs"
            )

    def _stop(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._process, self._finalizer, self._log = None, None, None

    def _exchange(self, request: bytes, timeout_seconds: float) -> dict[str, Any]:
        """Write the request, if any, and read one line; a worker that fails in this is ended."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        deadline = time.monotonic() + timeout_seconds
        try:
            if request:
                process.stdin.write(request)
                process.stdin.flush()
            line = self._read_line(process.stdout, deadline)
        except TimeoutError:
            self._stop()
            raise VerifierTimeoutError(f"no result within {timeout_seconds:g} s") from None
        except (BrokenPipeError, EOFError):
            last_words = self._last_words()
            code = process.wait()
            self._stop()
            raise VerifierError(f"the worker died (exit code {code}){last_words}") from None
        except BaseException:  # Ctrl-C between request and reply: the stream is out of step
            self._stop()
            raise
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _read_line(self, stream: IO[bytes], deadline: float) -> bytes:
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                remaining_seconds = deadline - time.monotonic()
                if remaining_seconds <= 0 or not selector.select(remaining_seconds):
                    raise TimeoutError
                chunk = os.read(stream.fileno(), 65536)
                if not chunk:
                    raise EOFError
                self._unread += chunk
        line, self._unread = self._unread.split(b"\n", 1)
        return line

    def _last_words(self) -> str:
        assert self._log is not None
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""
