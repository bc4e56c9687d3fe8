"""Optional packages: which extra of coatrt brings each, and one line for those that are missing."""

import importlib.util

from coatrt.errors import CoatError

__all__ = ["EXTRAS", "ExtraError", "extra_of", "needs", "require"]

EXTRAS: dict[str, dict[str, str]] = {
    "cpu": {"onnxruntime": "onnxruntime"},
    "train": {
        "torch": "torch",
        "transformers": "transformers",
        "accelerate": "accelerate",
        "onnx_ir": "onnx-ir",
    },
    "report": {"matplotlib": "matplotlib"},
    "rtx": {"tensorrt_rtx": "tensorrt-rtx", "polygraphy": "polygraphy"},
    "tensorrt": {"tensorrt": "tensorrt", "polygraphy": "polygraphy"},
    "gguf": {"gguf": "gguf", "sentencepiece": "sentencepiece"},
    "sign": {"cryptography": "cryptography"},
}
"""Extra → module → its package; `cuda` brings the module of `cpu` too."""


class ExtraError(CoatError, ImportError):
    """A package is missing that an extra brings."""


def needs(what: str, extra: str) -> str:
    """Return the line that names the missing packages of an extra, and how to install them.

    Args:
        what: who needs them, such as "coatrt train".
        extra: a name of `EXTRAS`.
    """
    packages = [package for module, package in EXTRAS[extra].items() if not _installed(module)]
    packages = packages or list(EXTRAS[extra].values())
    named = " and ".join([*([", ".join(packages[:-1])] if packages[1:] else []), packages[-1]])
    other = ", or '.[cuda]' for an NVIDIA GPU," if extra == "cpu" else ""
    # No index is named until coatrt is published there: whoever took its name would run code on the reader's machine.
    return f"{what} needs {named}: pip install '.[{extra}]'{other} in a checkout of coatrt"


def require(what: str, *extras: str) -> None:
    """Refuse work that lacks a package of an extra, before it begins; nothing is imported.

    Args:
        what: who needs them, such as "coatrt train".
        extras: names of `EXTRAS`.

    Raises:
        ExtraError: a package is missing.
    """
    for extra in extras:
        if not all(map(_installed, EXTRAS[extra])):
            raise ExtraError(needs(what, extra))


def extra_of(error: BaseException) -> str | None:
    """Return the extra that brings the module which an import did not find; None where there is none."""
    module = (getattr(error, "name", None) or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return next((extra for extra, modules in EXTRAS.items() if module in modules), None)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # ValueError: something has put None, or a module without a spec, in its place
        return False
