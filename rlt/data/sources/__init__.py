"""Where problems come from, one file a source."""
