"""`python -m rlt` is the same as `rlt`."""

from rlt.main import main

main()
