"""Numbers in files: types that say which values they have, which `coatrt.system.json_data.convert` checks by place."""

from typing import Annotated

from msgspec import Meta

__all__ = ["Bytes", "Count", "Integer", "Layers", "Measure", "Real", "Whole"]

Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
"""A width, a number of tokens, of slots, of rows."""

Layers = Annotated[int, Meta(ge=1, le=4096)]
"""Decoder layers: lists are made of that many."""

Whole = Annotated[int, Meta(ge=0, le=2**31 - 1)]
"""A token, a step, a compute capability, a number of things that may be none."""

Bytes = Annotated[int, Meta(ge=0, le=2**60)]
"""A size in bytes, or a number of weights."""

Integer = Annotated[int, Meta(ge=-(2**53), le=2**53)]
"""Any integer that a float holds too, such as a seed."""

Measure = Annotated[float, Meta(ge=0, le=1e18)]
"""Seconds, bits per weight, an error: whatever is measured and cannot be negative."""

Real = Annotated[float, Meta(ge=-1e18, le=1e18)]
"""A loss or a cost; far from where sums of it overflow."""
