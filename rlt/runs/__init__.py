"""Run folders: what a run is known by, what it leaves, and how it ends."""
