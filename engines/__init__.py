"""ONNX to engine and its use: builders, runtimes, generation, bundles, verification, benchmark."""
