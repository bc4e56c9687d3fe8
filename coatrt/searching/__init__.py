"""Search: measured configurations of an adapter."""
