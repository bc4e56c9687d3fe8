"""Configurations, which give each matrix a format, and the contract of their LoRA tensors."""
