"""Measured configurations of an adapter."""
