"""A run in a process of its own: `python -m rlt.cli.worker <config.yaml> <run dir> <parent's pid>`.

The jobs of a sweep and reproductions run this way, so that nothing that one of them loaded, changed
or used up affects the next. An optional `metadata.json` beside the config has entries for the
manifest. The worker writes `result.json` there, with the metrics or the error.
"""

import os
import sys
from pathlib import Path

from rlt.cli.run import run
from rlt.config.compose import IN_FULL, USER_ERRORS, explain
from rlt.config.saved import load_config
from rlt.runs.files import read_json, write_json
from rlt.runs.ranks import RankStoppedError
from rlt.runs.signals import end_with, exit_status, terminable


def main() -> None:
    """Run the config that the command line names and leave `result.json` beside it.

    Raises:
        SystemExit: with 130 or 143 if the run was interrupted or terminated, and with 2 after an
            error that the user can correct. Any other error is raised as it is.
    """
    config, run_dir, parent = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    facts_file, result_file = config.with_name("metadata.json"), config.with_name("result.json")
    metadata = read_json(facts_file) if facts_file.is_file() else {}
    try:
        with terminable():
            end_with(parent)
            metrics = run(load_config(config), run_dir, metadata)
    except BaseException as error:
        status = exit_status(error)
        if status is not None:
            sys.exit(status)
        if isinstance(error, RankStoppedError) and not IN_FULL:
            print(f"rlt: {error}", file=sys.stderr)
            sys.exit(2)
        write_json(result_file, {"error": f"{type(error).__name__}: {error}"})
        if IN_FULL or not isinstance(error, USER_ERRORS):
            raise
        print(f"\nrlt: {explain(error, [])}", file=sys.stderr)
        sys.exit(2)
    if os.environ.get("RANK", "0") == "0":
        write_json(result_file, {"metrics": metrics})


if __name__ == "__main__":
    main()
