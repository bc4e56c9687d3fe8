"""A matrix to its codes and back."""
