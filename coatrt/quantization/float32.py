"""Matrix products in full float32: GPUs may be set to TF32, whose 10 mantissa bits are too few here."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["full_float32"]


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute products of float32 matrices in full precision inside the context."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # TF32 is set by torch's newer switch, which excludes the older one
        switch = torch.backends.cuda.matmul
        setting, switch.fp32_precision = switch.fp32_precision, "ieee"
        try:
            yield
        finally:
            switch.fp32_precision = setting
        return
    if before == "highest":  # torch's default
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
