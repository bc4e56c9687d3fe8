"""Bundles: making and checking them."""
