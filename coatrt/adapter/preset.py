"""The forms of the hypernetwork θ by name, read without torch."""

from typing import Literal

__all__ = ["Preset"]

Preset = Literal["none", "coatrt", "paper"]
"""Forms of θ; "none" stands for an adapter without one."""
