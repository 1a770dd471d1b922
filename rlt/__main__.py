"""`python -m rlt` is the same as `rlt`."""

from rlt.cli.main import main

main()
