"""Codes of a few bits packed in 32-bit words, as compressed-tensors, GPTQ and AWQ store them."""

import numpy as np
import torch
from torch import Tensor

__all__ = ["unpack_nibbles", "unpack_words"]


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Return the codes in rows of words: a row is one stream of bits, each code in its next `bits`, low bits first.

    Args:
        words: int32 [rows, words].
        bits: 2, 3, 4 or 8.

    Returns:
        uint8 [rows, words · 32 / bits], rounded down.
    """
    rows = words.contiguous().numpy().view(np.uint8).reshape(len(words), -1)  # little-endian, as every GPU host is
    if bits == 8:
        return torch.from_numpy(rows.copy())
    if bits in (2, 4):
        parts = [(rows >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
        return torch.from_numpy(np.stack(parts, -1).reshape(len(rows), -1))
    stream = np.unpackbits(rows, axis=1, bitorder="little")
    whole = stream[:, : stream.shape[1] // bits * bits].reshape(len(rows), -1, bits)
    return torch.from_numpy(np.packbits(whole, axis=-1, bitorder="little").reshape(len(rows), -1))


def unpack_nibbles(data: Tensor) -> Tensor:
    """Return the 4-bit codes of bytes, uint8 [rows, 2 · bytes], the low half of each byte first."""
    return torch.stack([data & 15, data >> 4], -1).reshape(len(data), -1)
