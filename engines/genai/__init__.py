"""Bundles for onnxruntime-genai: a model directory, and a package of several."""
