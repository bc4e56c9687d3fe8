"""What quantization costs a model."""
