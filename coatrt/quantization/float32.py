"""Products in float32 as such: GPUs may be told to take TF32 instead, whose 10 bits are too few here."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["full_float32"]


@contextmanager
def full_float32() -> Iterator[None]:
    """Have products of float32 matrices keep all bits for as long as the context lasts."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # TF32 was asked for by torch's newer switch, and the two do not mix
        switch = torch.backends.cuda.matmul
        asked, switch.fp32_precision = switch.fp32_precision, "ieee"
        try:
            yield
        finally:
            switch.fp32_precision = asked
        return
    if before == "highest":  # torch's default
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
