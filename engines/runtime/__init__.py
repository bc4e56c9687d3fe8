"""Running a decoder graph or an engine."""
