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
    "serve": {"starlette": "starlette", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"},
    "eval": {"lm_eval": "lm-eval", "datasets": "datasets"},
}
"""Extra → module → its package; `cuda` brings the module of `cpu` too."""


class ExtraError(CoatError, ImportError):
    """A package is missing that an extra brings."""


def needs(what: str, *extras: str) -> str:
    """Return the line that names the missing packages of extras, and how to install them.

    Args:
        what: who needs them, such as "coatrt train".
        extras: names of `EXTRAS`.
    """
    modules = {module: package for extra in extras for module, package in EXTRAS[extra].items()}
    packages = [package for module, package in modules.items() if not _installed(module)] or list(modules.values())
    named = " and ".join([*([", ".join(packages[:-1])] if packages[1:] else []), packages[-1]])
    other = "; with an NVIDIA GPU take cuda in place of cpu" if "cpu" in extras else ""
    # No index is named until coatrt is published there: whoever took its name would run code on the reader's machine.
    return f"{what} needs {named}: pip install '.[{','.join(extras)}]' in a checkout of coatrt{other}"


def require(what: str, *extras: str) -> None:
    """Refuse work that lacks a package of an extra, before it begins; nothing is imported.

    Args:
        what: who needs them, such as "coatrt train".
        extras: names of `EXTRAS`.

    Raises:
        ExtraError: a package is missing.
    """
    lacking = [extra for extra in extras if not all(map(_installed, EXTRAS[extra]))]
    if lacking:
        raise ExtraError(needs(what, *lacking))


def extra_of(error: BaseException) -> str | None:
    """Return the extra that brings the module which an import did not find; None where there is none."""
    module = (getattr(error, "name", None) or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return next((extra for extra, modules in EXTRAS.items() if module in modules), None)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # ValueError: something has put None, or a module without a spec, in its place
        return False
