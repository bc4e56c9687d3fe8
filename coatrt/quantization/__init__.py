"""Quantization: a matrix to its codes and back."""
