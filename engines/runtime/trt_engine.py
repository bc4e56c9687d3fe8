"""A TensorRT engine: which of a bundle fits this GPU, how it loads, and contexts whose tensors have fixed places.

TensorRT forbids to change a context that a CUDA graph was captured from, its shapes included, so that decode steps and
prefills have a context each. They share the memory of activations, since they never run at the same time.
"""

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from coatrt.bundle import Bundle
from coatrt.errors import BuildError, reason
from coatrt.system.extras import needs

__all__ = ["TrtContext", "TrtEngine", "engine_facts", "load_library"]

_TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64"}  # numpy's and TensorRT's names
_MOST_MESSAGES = 8


def engine_facts(bundle: Bundle, sm: int, batch: int) -> Mapping[str, Any]:
    """Return what the manifest says of the bundle's engine for a GPU.

    Raises:
        BuildError: it has none for it, or none for such a batch.
    """
    engines = bundle.manifest["engines"]
    fits = [engine for engine in engines if sm in engine["sms"]]
    if not fits:
        have = ", ".join(f"SM{sm}" for engine in engines for sm in engine["sms"]) or "none"
        raise BuildError(f"the bundle has engines for {have}, this GPU is SM{sm}; build one for it")
    facts: Mapping[str, Any] = fits[0]
    if batch > facts["shapes"]["batch"]:
        raise BuildError(
            f"the engine takes a batch of {facts['shapes']['batch']}, {batch} is given; build with --batch"
        )
    return facts


def load_library(facts: Mapping[str, Any]) -> Any:
    """Return the module tensorrt_rtx or tensorrt that an engine was built with.

    Raises:
        BuildError: it is not installed, or in another version.
    """
    try:
        trt = importlib.import_module(facts["builder"].replace("-", "_"))
    except ModuleNotFoundError:
        line = needs("the engine", "rtx" if facts["builder"] == "tensorrt-rtx" else "tensorrt")
        raise BuildError(f"{line}, in the version {facts['version']}; or use --backend ort") from None
    except (ImportError, OSError) as error:  # OSError: its libraries do not load
        raise BuildError(
            f"the engine needs {facts['builder']} ({reason(error)}); install it, or use --backend ort"
        ) from None
    if trt.__version__ != facts["version"]:
        raise BuildError(
            f"the engine needs {facts['builder']} {facts['version']}, here is {trt.__version__}; "
            "engines do not load across versions: build the bundle again"
        )
    return trt


class _Messages:
    """What TensorRT says is wrong; it would print it otherwise, over several lines."""

    def __init__(self, trt: Any) -> None:
        said: list[str] = []
        least = trt.ILogger.Severity.ERROR

        def log(_: Any, severity: Any, message: str) -> None:
            if severity <= least and len(said) < _MOST_MESSAGES:
                said.append(message)

        names = {"__init__": lambda logger: trt.ILogger.__init__(logger), "log": log}
        self.logger: Any = type("Messages", (trt.ILogger,), names)()
        self._said = said

    def clear(self) -> None:
        self._said.clear()

    def first(self) -> str:
        """Return the first since `clear`, which is the cause of the others."""
        return reason(RuntimeError(self._said[0])) if self._said else "no reason is given"


class TrtEngine:
    """An engine on the GPU.

    Args:
        trt: the module tensorrt_rtx or tensorrt.
        plan: the engine's bytes, their hash checked.

    Raises:
        BuildError: it does not load.
    """

    def __init__(self, trt: Any, plan: bytes) -> None:
        self.trt, self.messages = trt, _Messages(trt)
        try:
            self._runtime = trt.Runtime(self.messages.logger)
        except Exception as error:  # without a driver that serves it, its pointer is null
            raise BuildError(
                f"TensorRT does not start ({reason(error)}); update the driver, or use --backend ort"
            ) from None
        self.engine = self._runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise BuildError(
                f"the engine does not load ({self.messages.first()}): another TensorRT version or another GPU; "
                "build the bundle again"
            )
        self.names = frozenset(self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors))
        self.activation_bytes = int(self.engine.device_memory_size_v2)

    def context(self, activations: int, *, one_shape: bool) -> "TrtContext":
        """Return a context.

        Args:
            activations: address of `activation_bytes`.
            one_shape: TensorRT-RTX compiles the kernels of its shapes before it runs them. Else general ones run
                meanwhile, which a captured step would go on with.

        Raises:
            BuildError: TensorRT makes none.
        """
        trt, strategy = self.trt, self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.messages.clear()
        if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):  # TensorRT-RTX
            config = self.engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            if one_shape:
                eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
                config.dynamic_shapes_kernel_specialization_strategy = eager
            made = self.engine.create_execution_context(config)
        else:
            made = self.engine.create_execution_context(strategy)
        if made is None:
            raise BuildError(f"TensorRT makes no context ({self.messages.first()}); free memory on the GPU")
        made.set_device_memory(activations, self.activation_bytes)
        return TrtContext(self, made)


class TrtContext:
    """A context of an engine; `TrtEngine.context` makes it."""

    def __init__(self, engine: TrtEngine, context: Any) -> None:
        self._engine, self._context = engine, context
        self._shapes: dict[str, tuple[int, ...]] = {}

    def place(self, name: str, address: int, shape: tuple[int, ...], dtype: "np.dtype[Any]") -> None:
        """Give a tensor its place, after the engine agreed on its rank, its fixed sizes and its type.

        Raises:
            BuildError: it does not agree.
        """
        engine, known = self._engine.engine, name in self._engine.names
        sizes = tuple(engine.get_tensor_shape(name)) if known else ()
        same = len(sizes) == len(shape) and all(a in (-1, b) for a, b in zip(sizes, shape, strict=True))
        same = same and engine.get_tensor_dtype(name) == getattr(self._engine.trt.DataType, _TYPES[dtype.name])
        if not (known and same and self._context.set_tensor_address(name, address)):
            raise BuildError(f"the engine and the manifest differ in {name}; build the bundle again")

    def shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Set the shape of an input, where it is another than before.

        Raises:
            BuildError: the engine refuses it.
        """
        if self._shapes.get(name) == shape:
            return
        self._engine.messages.clear()
        if not self._context.set_input_shape(name, shape):
            raise BuildError(
                f"the engine refuses the shape {shape} of {name} ({self._engine.messages.first()}); "
                "build the bundle again"
            )
        self._shapes[name] = shape

    def capturable(self, stream: int) -> bool:
        """Return whether a run can be captured; regular TensorRT says so only by failing."""
        return not hasattr(self._context, "is_stream_capturable") or self._context.is_stream_capturable(stream)

    def enqueue(self, stream: int) -> str:
        """Start a run; return why it fails, nothing where it does not."""
        self._engine.messages.clear()
        return "" if self._context.execute_async_v3(stream) else self._engine.messages.first()
