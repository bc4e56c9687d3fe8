"""coatrt: one language model on many unlike NVIDIA GPUs, each with its own precision map and a LoRA fitted to it.

What the commands do are names here, listed in `__init__.pyi`. Each is imported when it is first asked for:
`import coatrt` itself costs no torch.
"""

import os

import lazy_loader

# Read when these libraries are loaded, which is later. A user's own setting wins.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]
