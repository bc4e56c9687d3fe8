"""The effect of quantization on a model."""
