"""coatrt: one language model on many unlike NVIDIA GPUs, each with its own precision map and a LoRA fitted to it.

What the commands do are names here, listed in `__init__.pyi`. Each is imported when it is first asked for:
`import coatrt` itself costs no torch.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]
