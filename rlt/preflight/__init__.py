"""Checks before a run starts: its plan, its estimated memory and its measured first steps."""
