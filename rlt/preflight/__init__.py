"""What is known of a run before it starts: its plan, its memory, its first steps."""
