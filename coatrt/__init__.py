"""coatrt: one language model on many unlike NVIDIA GPUs, each with its own precision map and a LoRA fitted to it."""

__version__ = "0.1.0"
__all__ = ["__version__"]
