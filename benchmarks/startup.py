"""How long `rlt` takes to show its first line and to end, in wall and CPU seconds.

Each command runs in a terminal of its own (a pseudo-terminal, so that lines come as a user sees
them), in turn, after one round that fills the caches of files.

    python -m benchmarks.startup
"""

import os
import pty
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import parse, parser, publish, run_from_command_line
from benchmarks.machine import machine_facts


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and return what it publishes, as its JSON file holds it.

    Args:
        argv: the command line; None means `sys.argv[1:]`.
    """
    made = parser(__doc__, model="nano")
    made.set_defaults(repeats=5)
    args = parse(made, argv)
    model = [] if args.model == "nano" else [f"model@teacher={args.model}"]
    commands = {
        "rlt --help": ["--help"],
        "rlt --cfg job experiment=quickstart": ["--cfg", "job", "experiment=quickstart"],
        "rlt stage=teacher_rl check=true": ["stage=teacher_rl", "check=true"],
    }
    commands["rlt stage=teacher_rl check=true"] += [*model, *args.overrides]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for timed in [False] + [True] * args.repeats:
        for name, options in commands.items():
            seconds = run([*entrypoint(), *options])
            if timed:
                runs[name].append(seconds)
    rows = []
    for name, found in runs.items():
        medians = {key: statistics.median(one[key] for one in found) for key in found[0]}
        slowest = max(one["first_line_seconds"] for one in found)
        rows.append({"arm": name, **medians, "slowest_first_line": slowest})
    machine = machine_facts(torch.device("cpu"), torch.float32)
    return publish("startup", args, machine, rows, settings={})


def entrypoint() -> list[str]:
    """The command `rlt` of this environment."""
    script = Path(sys.executable).with_name("rlt")
    if script.is_file():
        return [str(script)]
    found = shutil.which("rlt")
    return [found] if found else [sys.executable, "-c", "from rlt.cli.main import main; main()"]


def run(command: list[str]) -> dict[str, float]:
    """Seconds to the first line with text on it, to the end, and of CPU.

    Raises:
        RuntimeError: the command failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = pty.openpty()
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        shown, first_line = b"", 0.0
        while chunk := _read(ours):
            shown += chunk
            if not first_line and b"\n" in shown.lstrip():
                first_line = time.perf_counter() - started
        _, status, usage = os.wait4(process.pid, 0)
        whole = time.perf_counter() - started
        os.close(ours)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{shown.decode(errors='replace')}")
    return {
        "first_line_seconds": first_line,
        "seconds": whole,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
    }


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux: the other end has closed
        return b""


if __name__ == "__main__":
    run_from_command_line(main)
