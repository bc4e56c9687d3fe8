"""Engines from graphs."""
