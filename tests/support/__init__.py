"""Helpers that several tests share: tiny models, model families, fake devices, decoding in numpy."""
