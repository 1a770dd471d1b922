"""The command line: run a stage, resume a run, reproduce one, compare two."""
