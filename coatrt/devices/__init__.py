"""GPUs, and this machine."""
