"""The sources of problems, one module for each kind."""
