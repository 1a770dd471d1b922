"""Commands on runs and on the config: `rlt resume outputs/mine`, `rlt where optim.lr`.

Everything else on the command line is `key=value`, which Hydra composes (`rlt.cli.hydra_app`).
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rlt.config.suggestions import did_you_mean

# Command → what stands behind its name.
USAGE = {
    "resume": "<run> [key=value ...]",
    "reproduce": "<run>",
    "diff": "<run> <run>",
    "compare": "<run> [<run> ...] [key=value ...]",
    "where": "<key> [key=value ...]",
}


def command_of(arguments: list[str]) -> Callable[[], int] | None:
    """What the command line asks for, if it begins with a command; it returns an exit status.

    Returns:
        None for a command line of options and `key=value` alone.

    Raises:
        ValueError: no such command, or one whose arguments are none of its own.
    """
    for one in arguments:
        name, equals, value = one.partition("=")
        if equals and name in ("resume", "reproduce", "diff"):
            runs = value.replace(",", " ") if name == "diff" else value
            raise ValueError(
                f"{one}: {name} is a command, not a key; write: rlt {name} {runs or USAGE[name]}"
            )
    name = arguments[0]
    if "=" in name or name.startswith(("-", "~")):
        return None
    if name not in USAGE:
        raise ValueError(
            f"{name}: no such command{did_you_mean(name, USAGE)}; the commands are "
            f"{', '.join(USAGE)}; a setting is written key=value"
        )
    rest = arguments[1:]
    options = [one for one in rest if one.startswith("-")]
    if options and name != "where":
        raise ValueError(f"{' '.join(options)}: {name} takes no options; leave them out")
    if not rest:
        raise ValueError(f"rlt {name}: something is missing; write: rlt {name} {USAGE[name]}")
    return partial(_COMMANDS[name], rest)


def _resume(arguments: list[str]) -> int:
    from rlt.cli.resume import resume

    return resume(Path(arguments[0]), arguments[1:])


def _reproduce(arguments: list[str]) -> int:
    from rlt.cli.reproduce import reproduce

    (run,) = _exactly(1, "reproduce", arguments)
    return reproduce(run)


def _diff(arguments: list[str]) -> int:
    from rlt.report.difference import show_difference

    return show_difference(*_exactly(2, "diff", arguments))


def _compare(arguments: list[str]) -> int:
    """`stage=compare` over runs; `key=value` among them are its settings."""
    from rlt.cli.hydra_app import compose_and_run
    from rlt.cli.resume import quoted

    # The folder of a sweep's job may have = in its name.
    runs = [one for one in arguments if "=" not in one or Path(one).is_dir()]
    if not runs:
        raise ValueError(f"rlt compare: no run is given; write: rlt compare {USAGE['compare']}")
    settings = [one for one in arguments if one not in runs]
    sys.argv[1:] = ["stage=compare", f"runs=[{','.join(map(quoted, runs))}]", *settings]
    compose_and_run()
    return 0


def _where(arguments: list[str]) -> int:
    from rlt.cli.where import where

    return where(arguments[0], arguments[1:])


def _exactly(count: int, name: str, arguments: list[str]) -> list[Path]:
    """The run folders of a command that takes so many, and nothing else."""
    if len(arguments) != count:
        raise ValueError(
            f"{' '.join(arguments)}: {name} takes {count} run folder{'s' * (count > 1)} and "
            f"nothing else; write: rlt {name} {USAGE[name]}"
        )
    return [Path(one) for one in arguments]


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "resume": _resume,
    "reproduce": _reproduce,
    "diff": _diff,
    "compare": _compare,
    "where": _where,
}
