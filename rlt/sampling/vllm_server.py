"""One vLLM server over HTTP: started and ended with the run, or one that runs already.

vLLM pins its own version of transformers, so it lives in an environment of its own, and its stock
server (`vllm.entrypoints.openai.api_server`) is asked. Every answer is checked, and whatever goes
wrong ends in a `RolloutServerError` within a time limit.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import requests

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_CONNECT_SECONDS = 5.0
_POLL_SECONDS = 0.5
_LAST_LINES = 5  # of a dead server's output, in messages
# What a server needs to take new weights while it runs, and to run on a CPU.
_ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
}


class RolloutServerError(ValueError):
    """A rollout server is dead, does not answer in time, or does not do what it was asked."""


class Server:
    """A vLLM server.

    Args:
        url: such as `http://127.0.0.1:8000`.
        timeout_seconds: that it may take for an answer, or for the next part of one.
        process: the server's, if this process has started it.
        output: the file that holds its output.
    """

    def __init__(
        self,
        url: str,
        timeout_seconds: float,
        process: subprocess.Popen[bytes] | None = None,
        output: Path | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.timeout_seconds = timeout_seconds
        self.process = process
        self.output = output

    def ask(self, path: str, body: Mapping[str, Any] | None = None, get: bool = False) -> Any:
        """What the server answers: decoded JSON, or text.

        Raises:
            RolloutServerError: it does not answer in time, or refuses.
        """
        with self._told(path):
            limits = (_CONNECT_SECONDS, self.timeout_seconds)
            method = "GET" if get else "POST"
            with _session() as session:
                answer = session.request(method, self.url + path, json=body, timeout=limits)
            self._require_success(answer, path)
            return (
                answer.json() if "json" in answer.headers.get("content-type", "") else answer.text
            )

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The parts of an answer that the server sends one by one.

        Raises:
            RolloutServerError: it refuses, ends early, or sends nothing for the time limit.
        """
        with self._told(path):
            limits = (_CONNECT_SECONDS, self.timeout_seconds)
            with (
                _session() as session,
                session.post(
                    self.url + path, json={**body, "stream": True}, timeout=limits, stream=True
                ) as answer,
            ):
                self._require_success(answer, path)
                for line in answer.iter_lines():
                    content = line.removeprefix(b"data:").strip()
                    if content == b"[DONE]":
                        return
                    if content:
                        part = json.loads(content)
                        if "error" in part:
                            raise RolloutServerError(f"{self.url}{path}: {part['error']}")
                        yield part
        raise RolloutServerError(f"{self.url}{path}: the answer ended before it was complete")

    def close(self) -> None:
        """End the server, if this process has started it."""
        if self.process is None or self.process.poll() is not None:
            return
        for how in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=10)
                return

    @contextlib.contextmanager
    def _told(self, path: str) -> Iterator[None]:
        try:
            yield
        except requests.Timeout as error:
            raise RolloutServerError(
                f"{self.url}{path}: no answer for {self.timeout_seconds:.0f} s "
                f"(rollout.timeout_seconds){self.ending()}"
            ) from error
        except requests.RequestException as error:
            # What requests raises while it reads a stream is not always its Timeout.
            if "timed out" in str(error).lower():
                raise RolloutServerError(
                    f"{self.url}{path}: nothing more for {self.timeout_seconds:.0f} s "
                    f"(rollout.timeout_seconds){self.ending()}"
                ) from error
            reason = type(error).__name__
            raise RolloutServerError(
                f"{self.url}{path}: the server cannot be reached or has ended ({reason})"
                f"{self.ending()}"
            ) from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise RolloutServerError(
                f"{self.url}{path}: the answer is no JSON ({error})"
            ) from error

    def _require_success(self, answer: requests.Response, path: str) -> None:
        if not answer.ok:
            told = " ".join(answer.text.split())[:300]
            raise RolloutServerError(f"{self.url}{path}: status {answer.status_code}: {told}")

    def ending(self) -> str:
        """The last lines of the server's output, for messages."""
        if self.output is None or not self.output.is_file():
            return ""
        lines = self.output.read_text(encoding="utf-8", errors="replace").splitlines()
        return "; its last output:\n" + "\n".join(lines[-_LAST_LINES:])


def start_server(
    python: str,
    model: Path,
    name: str,
    arguments: Sequence[str],
    output: Path,
    timeout_seconds: float,
    start_seconds: float,
) -> Server:
    """Start a server on a free port of this machine, and wait until it is ready.

    Args:
        python: interpreter of the environment that vLLM is installed in.
        model: folder of the weights that it begins with.
        name: that requests call the model by.
        arguments: of the server's command line, such as `["--max-model-len", "2048"]`.
        output: file for what it prints.
        timeout_seconds: see `Server`.
        start_seconds: that it may take to be ready.

    Raises:
        RolloutServerError: it ends, or is not ready in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)]
    command += arguments
    with output.open("ab") as file:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                env=_ENVIRONMENT | _without_python_paths(), start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )  # fmt: skip
        except OSError as error:
            raise RolloutServerError(
                f"rollout.python={python}: it cannot be run ({error.strerror}); give the "
                "interpreter of the environment that vLLM is installed in (docs/scaling.md)"
            ) from error
    server = Server(f"http://127.0.0.1:{port}", timeout_seconds, process, output)
    try:
        _wait_until_ready(server, process, start_seconds)
    except BaseException:
        server.close()
        raise
    return server


def _wait_until_ready(
    server: Server, process: subprocess.Popen[bytes], start_seconds: float
) -> None:
    end = time.monotonic() + start_seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RolloutServerError(
                f"the rollout server ended with status {process.returncode}{server.ending()}"
            )
        with contextlib.suppress(requests.RequestException), _session() as session:
            if session.get(f"{server.url}/health", timeout=_CONNECT_SECONDS).ok:
                return
        time.sleep(_POLL_SECONDS)
    raise RolloutServerError(
        f"the rollout server was not ready within {start_seconds:.0f} s "
        f"(rollout.start_seconds){server.ending()}"
    )


def _session() -> requests.Session:
    """A connection that no proxy of the environment stands in."""
    session = requests.Session()
    session.trust_env = False
    return session


def _end_with_parent() -> None:
    """Have Linux end this process when its parent does, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _without_python_paths() -> dict[str, str]:
    """This process's environment, less what would lead another Python to our packages."""
    ours = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    return {name: value for name, value in os.environ.items() if name not in ours}
