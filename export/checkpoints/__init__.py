"""Checkpoints for other runtimes: compressed-tensors with a PEFT adapter, and GGUF with a LoRA."""
