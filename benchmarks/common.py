"""What every benchmark shares: options, timings in turn, arms in processes, tables and JSON.

Arms that are compared are timed in turn within one run, so that a machine that slows down slows
all of them; what is compared by memory runs in a process of its own.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import installed, peak_bytes
from rlt.cli.quiet_libraries import quiet
from rlt.runs.files import write_json

Row = dict[str, Any]  # column → value of one line of a table
WITH_LORA = "+lora"  # ends the name of an arm that trains an adapter


def plain_parser(doc: str | None) -> argparse.ArgumentParser:
    """Options that every benchmark takes."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--output", type=Path, default=Path("outputs/benchmarks"))
    made.add_argument("overrides", nargs="*", help="config overrides, such as hardware=gpu_80gb")
    return made


def parser(doc: str | None, model: str = "smollm2_135m_packaged") -> argparse.ArgumentParser:
    """Options of a benchmark that times one model again and again."""
    made = plain_parser(doc)
    made.add_argument("--model", default=model, help="a file of conf/model; nano is tiny")
    made.add_argument("--repeats", type=int, default=3, help="timed rounds after one to warm up")
    return made


def parse(made: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of the command line, or those given; `given` keeps them as they were."""
    args = made.parse_intermixed_args(argv)
    if "repeats" in args and args.repeats < 1:
        made.error(f"--repeats={args.repeats}: time at least one round")
    args.given = list(sys.argv[1:] if argv is None else argv)
    return args


def run_from_command_line(main: Callable[[], Any]) -> None:
    """Run `main` as a script does, with the libraries' own messages silenced."""
    quiet()
    main()


# --- timing -------------------------------------------------------------------------------------


def alternate(arms: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every arm, run in turn: one round to warm up, then `repeats` timed ones."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for timed in [False] + [True] * repeats:
        for name, run in arms.items():
            gc.collect()
            wait()
            started = time.perf_counter()
            run()
            wait()
            if timed:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def wait() -> None:
    """Until the device has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timing(arm: str, seconds: Sequence[float]) -> Row:
    """A table's line for one arm: median, and the fastest and slowest round."""
    return {
        "arm": arm,
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
    }


def ratio(seconds: Mapping[str, Sequence[float]], slow: str, fast: str) -> float:
    """How many times faster one arm is than another, by medians."""
    return statistics.median(seconds[slow]) / statistics.median(seconds[fast])


# --- arms in processes of their own ---------------------------------------------------------------


def arm_options(made: argparse.ArgumentParser) -> None:
    """Options of a benchmark whose arms are processes that time several steps."""
    process_options(made)
    made.set_defaults(repeats=2)
    made.add_argument("--steps", type=int, default=2, help="timed steps of each process")


def process_options(made: argparse.ArgumentParser) -> None:
    """Options by which a benchmark starts an arm in a process of its own."""
    made.add_argument("--arm", help="run this arm, in this process")
    made.add_argument("--arm-file", type=Path, help="where it leaves its result")


def peer_options(made: argparse.ArgumentParser) -> None:
    """Those, and the options of a comparison with trl."""
    arm_options(made)
    made.add_argument(
        "--peer-checkpointing", action="store_true", help="trl checkpoints gradients, its default"
    )


def peer_and_rlt() -> list[str]:
    """The arms of a comparison with trl, which is left out where it is not installed."""
    return ["rlt"] if peer_missing() else ["trl", "rlt"]


def run_arms(
    benchmark: str, args: argparse.Namespace, arms: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """What each process of each arm left, by arm."""
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for _ in range(args.repeats):
        for arm in arms:
            found[arm].append(run_arm(benchmark, args, arm))
    return found


def run_arm(
    benchmark: str,
    args: argparse.Namespace,
    arm: str,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What a process of an arm left.

    Args:
        environment: variables for that process alone.

    Raises:
        RuntimeError: the process failed; the message ends with the end of its error output.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "arm.json"
        command = [
            sys.executable, "-m", f"benchmarks.{benchmark}", *args.given,
            "--arm", arm, "--arm-file", str(file),
        ]  # fmt: skip
        search = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        own = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, search))}
        variables = os.environ | own | dict(environment or {})
        done = subprocess.run(command, capture_output=True, text=True, env=variables)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
        found: dict[str, Any] = json.loads(file.read_text())
        return found


def against_peer(rows: Sequence[Row], what: str) -> dict[str, float]:
    """How many times faster and smaller the last arm is than the first, if there are two."""
    if len(rows) < 2:
        return {}
    peer, ours = rows[0], rows[-1]
    return {
        f"rlt against trl, {what}": peer["seconds"] / ours["seconds"],
        "rlt against trl, peak memory": peer["peak_gb"] / ours["peak_gb"],
    }


def leave(file: Path, result: Mapping[str, Any]) -> None:
    """Write an arm's result for the process that started it, with this process's peak memory."""
    write_json(file, {**result, "peak_bytes": peak_bytes()})


def peer_missing() -> str | None:
    """Why there is no comparison with trl, or None if there is one."""
    return None if installed("trl") else "trl is not installed: pip install '.[bench]'"


def peer() -> str:
    """Return the name and version of trl, or the reason why it takes no part."""
    return peer_missing() or f"trl {installed('trl')}"


# --- results --------------------------------------------------------------------------------------


def publish(
    name: str,
    args: argparse.Namespace,
    machine: Mapping[str, Any],
    rows: Sequence[Row],
    *,
    settings: Mapping[str, Any],
    ratios: Mapping[str, float] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Print the table and the ratios, and write everything to `<output>/<name>.json`."""
    shared = {name: vars(args)[name] for name in ("model", "repeats") if name in args}
    settings = {**shared, **settings}
    result = {
        "benchmark": name,
        "command": " ".join(["python", "-m", f"benchmarks.{name}", *args.given]),
        "machine": dict(machine),
        "settings": settings,
        "rows": list(rows),
        "ratios": dict(ratios or {}),
        **more,
    }
    console = Console(markup=False, width=None if sys.stdout.isatty() else 120)
    table = Table(title=name, caption=", ".join(f"{k} {v}" for k, v in settings.items()))
    for column in (columns := list(dict.fromkeys(key for row in rows for key in row))):
        table.add_column(column.replace("_", " "), justify="left" if column == "arm" else "right")
    for row in rows:
        table.add_row(*(_shown(row.get(column)) for column in columns))
    console.print(table)
    for label, value in result["ratios"].items():
        console.print(f"{label}: {value:.2f}×")
    for label, text in more.items():
        console.print(f"{label}: {_shown(text)}")
    console.print(
        f"{machine['cpu']}, {machine['torch_threads']} threads, {machine['dtype']}: "
        f"{machine['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s, "
        f"{machine['read_bytes_per_second'] / 1e9:.1f} GB/s"
    )
    args.output.mkdir(parents=True, exist_ok=True)
    write_json(args.output / f"{name}.json", result)
    return result


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_shown(v)}" for k, v in value.items())
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)
