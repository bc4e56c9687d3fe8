"""Checkpoints, and the specification of their decoders."""
