"""Checkpoint and adapter → ONNX: decoder graphs, weight storage, the hypernetwork."""
