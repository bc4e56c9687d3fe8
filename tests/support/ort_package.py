"""ONNX Runtime's own reader of model packages, through its C interface: the Python packages do not offer it yet."""

import ctypes
from pathlib import Path
from typing import Any

import onnxruntime as ort

__all__ = ["resolve", "selected_variant"]

_API_VERSION = 31
_ERROR_MESSAGE, _CREATE_ENV, _CREATE_OPTIONS, _PACKAGES = 2, 3, 10, 427
"""Places in OrtApi, which is only ever appended to."""
_FUNCTIONS = {"options": 0, "open": 2, "variants": 8, "resolve": 10, "select": 11, "name": 13, "folder": 14}
"""Places in OrtModelPackageApi."""
_POINTER = ctypes.c_void_p


class _Base(ctypes.Structure):
    _fields_ = (("get_api", ctypes.CFUNCTYPE(_POINTER, ctypes.c_uint32)), ("version", _POINTER))


class _Runtime:
    """The functions of ONNX Runtime that read a model package."""

    def __init__(self) -> None:
        (path,) = Path(ort.__file__).parent.glob("capi/libonnxruntime.so.*")
        library = ctypes.CDLL(str(path))
        library.OrtGetApiBase.restype = ctypes.POINTER(_Base)
        api = library.OrtGetApiBase().contents.get_api(_API_VERSION)
        self._functions = ctypes.cast(api, ctypes.POINTER(_POINTER))
        self._packages = ctypes.cast(ctypes.CFUNCTYPE(_POINTER)(self._functions[_PACKAGES])(), ctypes.POINTER(_POINTER))
        self.env, self.options = _POINTER(), _POINTER()
        self._check(self._plain(_CREATE_ENV)(ctypes.c_int(3), b"test", ctypes.byref(self.env)))
        self._check(self._plain(_CREATE_OPTIONS)(ctypes.byref(self.options)))

    def _plain(self, place: int) -> Any:
        return ctypes.CFUNCTYPE(_POINTER)(self._functions[place])

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the model package API.

        Raises:
            RuntimeError: it fails, with its message.
        """
        self._check(ctypes.CFUNCTYPE(_POINTER)(self._packages[_FUNCTIONS[name]])(*arguments))

    def _check(self, status: int | None) -> None:
        if status:
            message = ctypes.CFUNCTYPE(ctypes.c_char_p, _POINTER)(self._functions[_ERROR_MESSAGE])(status)
            raise RuntimeError(message.decode())


def selected_variant(package: Path, component: str = "model") -> tuple[str, Path]:
    """Return name and directory of the variant that ONNX Runtime takes on the CPU.

    Raises:
        RuntimeError: it refuses the package, or no variant is for the CPU.
    """
    runtime, context, options, chosen = _Runtime(), _POINTER(), _POINTER(), _POINTER()
    name, folder = ctypes.c_char_p(), ctypes.c_char_p()
    runtime.call("open", str(package).encode(), ctypes.byref(context))
    runtime.call("options", runtime.env, runtime.options, ctypes.byref(options))
    runtime.call("select", context, component.encode(), options, ctypes.byref(chosen))
    runtime.call("name", chosen, ctypes.byref(name))
    runtime.call("folder", chosen, ctypes.byref(folder))
    assert name.value is not None
    assert folder.value is not None
    return name.value.decode(), Path(folder.value.decode())


def resolve(package: Path, base: Path, reference: str) -> Path:
    """Return what ONNX Runtime takes a path in a variant's settings for.

    Raises:
        RuntimeError: it refuses the path.
    """
    runtime, context, path = _Runtime(), _POINTER(), ctypes.c_char_p()
    runtime.call("open", str(package).encode(), ctypes.byref(context))
    arguments = (str(base).encode(), reference.encode(), ctypes.c_int(1))
    runtime.call("resolve", context, *arguments, ctypes.byref(path))
    assert path.value is not None
    return Path(path.value.decode())
