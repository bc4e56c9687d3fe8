"""Number types with ranges for values in files; `coatrt.system.json_data.convert` checks them and names the key."""

from typing import Annotated

from msgspec import Meta

__all__ = ["Bytes", "Count", "Integer", "Layers", "Measure", "Real", "Whole"]

Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
"""A width, or a number of tokens, slots or rows."""

Layers = Annotated[int, Meta(ge=1, le=4096)]
"""Decoder layers; lists of this length are allocated."""

Whole = Annotated[int, Meta(ge=0, le=2**31 - 1)]
"""A token, a step, a compute capability, or a count that may be 0."""

Bytes = Annotated[int, Meta(ge=0, le=2**60)]
"""A size in bytes, or a number of weights."""

Integer = Annotated[int, Meta(ge=-(2**53), le=2**53)]
"""An integer that a float represents exactly, such as a seed."""

Measure = Annotated[float, Meta(ge=0, le=1e18)]
"""A measurement that cannot be negative: seconds, bits per weight, an error."""

Real = Annotated[float, Meta(ge=-1e18, le=1e18)]
"""A loss or a cost; sums of it do not overflow."""
