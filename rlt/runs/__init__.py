"""Run folders, the identity of a run, its processes, and the ways in which it ends."""
