"""Files, memory, progress and processes."""
