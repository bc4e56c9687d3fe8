"""Names of the presets of the hypernetwork θ, importable without torch."""

from typing import Literal

__all__ = ["Preset"]

Preset = Literal["none", "coatrt", "paper"]
"""Presets of θ; "none" is an adapter without θ."""
