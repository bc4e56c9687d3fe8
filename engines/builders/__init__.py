"""Graphs → TensorRT engines."""
