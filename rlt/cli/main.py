"""The console script `rlt`: a command on runs, or settings that Hydra composes to a config."""

import sys
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from rlt.cli.commands import command_of
from rlt.cli.hydra_app import compose_and_run, print_error
from rlt.config.compose import IN_FULL, USER_ERRORS, config_dir
from rlt.runs.jobs import JobFailedError, failures, read_jobs
from rlt.runs.signals import exit_status, terminable

_PARTIAL_FAILURE = 1  # exit status of a sweep of which jobs have failed


def main() -> None:
    """Run what the command line asks for; an error is one line, no stack trace."""
    try:
        options = get_args_parser().parse_args()
        if options.help or len(sys.argv) == 1:
            # Hydra would copy every group again to list each, which takes seconds.
            print(OmegaConf.load(config_dir() / "config.yaml").hydra.help.template)
            return
        with terminable():
            if (command := command_of(sys.argv[1:])) is not None:
                sys.exit(command())
            compose_and_run()
    except KeyboardInterrupt as stop:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(exit_status(stop))
    except JobFailedError as error:
        folder = Path(error.args[2])
        told = any(job["status"] == "failed" for job in read_jobs(folder))
        print(f"\nrlt: {failures(folder) if told else error}", file=sys.stderr)
        sys.exit(_PARTIAL_FAILURE)
    except (*USER_ERRORS, HydraException) as error:
        if IN_FULL:
            raise
        print_error(error)
        sys.exit(2)


if __name__ == "__main__":
    main()
