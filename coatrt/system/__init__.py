"""Files, memory, progress, processes."""
