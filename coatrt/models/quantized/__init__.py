"""Checkpoints that are stored quantized: compressed-tensors, GPTQ, AWQ and ModelOpt."""
