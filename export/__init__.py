"""Checkpoint and adapter to ONNX: decoder graphs, weight formats, the hypernetwork."""
