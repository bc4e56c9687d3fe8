"""Products in float32 as such: GPUs may be told to take TF32 instead, whose 10 bits are too few here."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["full_float32"]


@contextmanager
def full_float32() -> Iterator[None]:
    """Have products of float32 matrices keep all bits for as long as the context lasts."""
    before = torch.get_float32_matmul_precision()
    if before == "highest":  # torch's default
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
