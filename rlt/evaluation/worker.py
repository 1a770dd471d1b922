"""The process in which answers are verified: it may hang or run out of memory without harm.

    python -m rlt.evaluation.worker <function> <memory_mb> <timeout_seconds>

Every line is one JSON object. A request on stdin holds the keyword arguments of the function. A
reply on stdout is `{"result": …}` or `{"error": "Type: text"}`. The first line on stdout is
`{"ready": true}`. The process ends when stdin closes. `rlt.evaluation.sandbox` is the other end: it
keeps the clock and kills.

What a model writes is hostile input: sympy and several reasoning-gym verifiers call `eval` on it.
The address space is therefore capped. Processor time is capped too, so that a worker does not
outlive its parent by much. An audit hook refuses to start processes, to open sockets, and to write,
move or delete files. All this stops accidents and cheap tricks, but it is no jail for a determined
attacker.
"""

import json
import logging
import math
import os
import re
import resource
import signal
import sys
import time
from typing import Any

from rlt.evaluation.verifiers import FUNCTIONS

_DENIED = re.compile(
    r"(os\.(system|exec|posix_spawn|spawn|fork|forkpty|kill|killpg|remove|rename|rmdir|mkdir|link"
    r"|symlink|truncate|chmod|chown|putenv)|subprocess\.Popen|shutil\..*|socket\..*|ctypes\.dlopen"
    r"|pty\.spawn|signal\.pthread_kill|sqlite3\.connect)"
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _refuse_side_effects(event: str, arguments: tuple[Any, ...]) -> None:
    if _DENIED.fullmatch(event):
        raise PermissionError(f"an answer may not call {event}")
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
        raise PermissionError(f"an answer may not write {arguments[0]!r}")


def _limit(kind: int, value: int) -> None:
    """Set a soft limit of this process, at most to its hard limit."""
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _cap_memory(memory_mb: int) -> None:
    """Limit the address space to what the imports took plus `memory_mb`."""
    used_bytes = 0
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as file:
            used_bytes = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    _limit(resource.RLIMIT_AS, used_bytes + memory_mb * 2**20)


def _cap_processor_time(timeout_seconds: float) -> None:
    """Let the process use `timeout_seconds` and a little more from now on. The kernel kills it."""
    _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + timeout_seconds) + 2)


def main(function: str, memory_mb: int, timeout_seconds: float) -> None:
    """Serve requests on stdin until it closes.

    Args:
        function: a key of `rlt.evaluation.verifiers.FUNCTIONS`.
        memory_mb: the memory that the requests may take beyond that of the imports, in MiB.
        timeout_seconds: the processor time that one request may take.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be taken for a reply

    def reply(**message: object) -> None:
        print(json.dumps(message), file=replies, flush=True)

    library, verify = FUNCTIONS[function]
    try:
        __import__(library)
    except Exception as error:  # handed to the parent, which says that the worker did not start
        reply(error=_described(error))
        return
    logging.disable(logging.CRITICAL)
    _cap_memory(memory_mb)
    sys.addaudithook(_refuse_side_effects)
    reply(ready=True)
    for line in sys.stdin:
        _cap_processor_time(timeout_seconds)
        try:
            verification = verify(**json.loads(line))
        except Exception as error:  # handed to the parent, which records it with the answer
            reply(error=_described(error))
        else:
            reply(result=verification)


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
