"""What a teacher-RL step costs, against what else one would use and against the machine's limits.

`benchmarks/README.md` says what each script measures and how to run it.
"""
