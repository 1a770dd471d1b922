"""The process in which answers are verified: it may hang or run out of memory without harm.

    python -m rlt.evaluation.worker <function> <memory_mb> <timeout_seconds>

One JSON object per line: requests on stdin (the keyword arguments of the function), replies on
stdout (`{"result": …}` or `{"error": "Type: text"}`); the first line written is `{"ready": true}`.
It ends when stdin closes. `rlt.evaluation.sandbox` is the other end: it keeps the clock and kills.

What a model writes is hostile input: sympy and several reasoning-gym verifiers call `eval` on it.
So the address space is capped, processor time is capped (a worker whose parent died cannot spin
on), and an audit hook refuses to start processes, open sockets, or write, move and delete files.
This stops accidents and cheap tricks; it is no jail for a determined attacker.
"""

import json
import logging
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Any

_DENIED = re.compile(
    r"(os\.(system|exec|posix_spawn|spawn|fork|forkpty|kill|killpg|remove|rename|rmdir|mkdir|link"
    r"|symlink|truncate|chmod|chown|putenv)|subprocess\.Popen|shutil\..*|socket\..*|ctypes\.dlopen"
    r"|pty\.spawn|signal\.pthread_kill|sqlite3\.connect)"
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_DUNDER = re.compile(r"__[a-z]+__")
_WORD = re.compile(r"[A-Za-z]{2,}")
_MATHS_WORDS = re.compile("and|sqrt|sin|cos|tan|cot|sec|csc|log|exp|infty|cup|cap|mod")
_SHORT_WORDS = re.compile("is|it|so|we|he|in|of|to|at|as|an|by|be|if|my|up|us|do|no")


def is_bare_expression(text: str) -> bool:
    r"""Whether the text is one expression, such as `\frac{1}{2}` or `x = 3 or x = 5`; not prose."""
    if re.search(r"\\\(|\\\[|\\boxed|(?<!\\)\$|\n", text):
        return False
    without_commands = re.sub(
        r"\\(?:text|textbf|mathrm|mbox|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+", " ", text
    )
    words = [word.lower() for word in _WORD.findall(without_commands)]
    return not any(
        _SHORT_WORDS.fullmatch(word) or (len(word) > 2 and not _MATHS_WORDS.fullmatch(word))
        for word in words
    )


def verify_maths(solution: str, answer: str) -> dict[str, Any]:
    """math-verify without its own alarm. A bare expression is read as LaTeX; prose is searched."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    targets = [LatexExtractionConfig(), ExprExtractionConfig()]

    def read(text: str) -> list[Any]:
        found: list[Any] = parse(text, targets, parsing_timeout=None, raise_on_error=True)
        return found

    gold = read(f"${solution.strip().strip('$')}$")
    if not gold:
        raise ValueError(f"math-verify cannot read the solution {solution!r}")
    readings = (f"${answer}$", answer) if is_bare_expression(answer) else (answer, f"${answer}$")
    target = read(readings[0]) or read(readings[1])
    if not target:
        return {"score": 0.0, "extracted": "", "reason": "unreadable"}
    extracted = next((part for part in target if isinstance(part, str)), "")
    correct = verify(gold, target, timeout_seconds=None)
    if not correct:  # a comparison that failed counts as unequal above: say which error it was
        correct = verify(gold, target, timeout_seconds=None, raise_on_error=True)
    return {"score": float(correct), "extracted": extracted, "reason": ""}


@cache
def _score_function(task: str) -> Callable[[str, dict[str, Any]], float]:
    import reasoning_gym

    score: Callable[[str, dict[str, Any]], float] = reasoning_gym.get_score_answer_fn(task)
    return score


def verify_reasoning_gym(task: str, entry: dict[str, Any], answer: str) -> dict[str, Any]:
    """The task's own verifier, which gives partial credit between 0 and 1."""
    if _DUNDER.search(answer):
        return {"score": 0.0, "extracted": answer, "reason": "unsafe answer"}
    from rlt.data.sources.procedural import decode_entry

    score = float(_score_function(task)(answer, decode_entry(entry)))
    return {"score": score, "extracted": answer, "reason": ""}


FUNCTIONS: dict[str, tuple[str, Callable[..., dict[str, Any]]]] = {
    "maths": ("math_verify", verify_maths),
    "reasoning_gym": ("rlt.data.sources.procedural", verify_reasoning_gym),
}


def _refuse_side_effects(event: str, arguments: tuple[Any, ...]) -> None:
    if _DENIED.fullmatch(event):
        raise PermissionError(f"an answer may not call {event}")
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
        raise PermissionError(f"an answer may not write {arguments[0]!r}")


def _cap_memory(memory_mb: int) -> None:
    """Limit the address space to what the imports took plus `memory_mb`."""
    import resource

    used_bytes = 0
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as file:
            used_bytes = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limit_bytes = used_bytes + memory_mb * 2**20
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        limit_bytes = min(limit_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, hard))


def _cap_processor_time(timeout_seconds: float) -> None:
    """Let the process use `timeout_seconds` and a little more from now on; the kernel kills it."""
    import resource

    limit_seconds = math.ceil(time.process_time() + timeout_seconds) + 2
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard != resource.RLIM_INFINITY:
        limit_seconds = min(limit_seconds, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (limit_seconds, hard))


def main(function: str, memory_mb: int, timeout_seconds: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be taken for a reply
    library, verify = FUNCTIONS[function]
    try:
        __import__(library)
    except ImportError as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=replies, flush=True)
        return
    logging.disable(logging.CRITICAL)
    _cap_memory(memory_mb)
    sys.addaudithook(_refuse_side_effects)
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        _cap_processor_time(timeout_seconds)
        try:
            reply: dict[str, Any] = {"result": verify(**json.loads(line))}
        except Exception as error:  # handed to the parent, which records it with the answer
            reply = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
