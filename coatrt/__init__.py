"""coatrt: one language model on many unlike NVIDIA GPUs, each with its own precision map and a LoRA fitted to it.

What the commands do are names here, listed in `__init__.pyi`. Each is imported when it is first asked for:
`import coatrt` itself costs no torch.
"""

import os
from pathlib import Path
from typing import Any

import lazy_loader

# Read when these libraries are loaded, which is later. A user's own setting wins.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"

_HERE = Path(__file__).resolve().parent
if not (_HERE / "export").is_dir():  # in a checkout the three folders of the package stand side by side
    __path__.append(str(_HERE.parent))

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]


def __getattr__(name: str) -> Any:
    try:
        return _load(name)
    except ModuleNotFoundError as error:
        from coatrt.system.extras import ExtraError, extra_of, needs

        extra = extra_of(error)
        if extra is None:
            raise
        raise ExtraError(needs(f"coatrt.{name}", extra)) from None
