"""A checkpoint, and what its decoder computes."""
