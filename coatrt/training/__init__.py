"""Training of adapters."""
