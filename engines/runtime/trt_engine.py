"""A TensorRT engine: picks a bundle's engine for this GPU, loads it, and binds tensors to fixed addresses.

TensorRT forbids changing a context that a CUDA graph was captured from, its shapes included. Decode and prefill
therefore have a context each. They share the activation memory, since they never run at the same time.
"""

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from coatrt.bundle import Bundle
from coatrt.errors import BuildError, reason
from coatrt.system.extras import needs

__all__ = ["TrtContext", "TrtEngine", "engine_facts", "load_library"]

_TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64"}  # numpy's name → TensorRT's
_MAX_MESSAGES = 8


def engine_facts(bundle: Bundle, sm: int, batch: int) -> Mapping[str, Any]:
    """Return the manifest's entry of the bundle's engine for a GPU.

    Raises:
        BuildError: the bundle has no engine for this compute capability, or none for this batch.
    """
    engines = bundle.manifest["engines"]
    matches = [engine for engine in engines if sm in engine["sms"]]
    if not matches:
        have = ", ".join(f"SM{sm}" for engine in engines for sm in engine["sms"]) or "no GPU"
        raise BuildError(f"the bundle has engines for {have}, this GPU is SM{sm}; build a bundle for it")
    facts: Mapping[str, Any] = matches[0]
    if batch > facts["shapes"]["batch"]:
        raise BuildError(
            f"batch must be at most {facts['shapes']['batch']} with this engine, got {batch}; build the bundle with a "
            "larger --batch"
        )
    return facts


def load_library(facts: Mapping[str, Any]) -> Any:
    """Return the module tensorrt_rtx or tensorrt that an engine needs.

    Raises:
        BuildError: it is not installed, or its version is not the one the engine was built with.
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
            f"the engine needs {facts['builder']} {facts['version']}, installed is {trt.__version__}; engines do not "
            "load across versions: install that version, or build the bundle again"
        )
    return trt


class _Messages:
    """Collects TensorRT's error messages, which it would otherwise print over several lines."""

    def __init__(self, trt: Any) -> None:
        messages: list[str] = []
        threshold = trt.ILogger.Severity.ERROR

        def log(_: Any, severity: Any, message: str) -> None:
            if severity <= threshold and len(messages) < _MAX_MESSAGES:
                messages.append(message)

        names = {"__init__": lambda logger: trt.ILogger.__init__(logger), "log": log}
        self.logger: Any = type("Messages", (trt.ILogger,), names)()
        self._messages = messages

    def clear(self) -> None:
        self._messages.clear()

    def first(self) -> str:
        """Return the first message since `clear`, the cause of those after it."""
        return reason(RuntimeError(self._messages[0])) if self._messages else "TensorRT gives no reason"


class TrtEngine:
    """An engine on the GPU.

    Args:
        trt: the module tensorrt_rtx or tensorrt.
        plan: the engine's bytes, whose hash the caller has checked.

    Raises:
        BuildError: TensorRT does not start, or the engine does not load.
    """

    def __init__(self, trt: Any, plan: bytes) -> None:
        self.trt, self.messages = trt, _Messages(trt)
        try:
            self._runtime = trt.Runtime(self.messages.logger)
        except Exception as error:  # without a suitable driver, TensorRT returns a null pointer
            raise BuildError(
                f"TensorRT does not start ({reason(error)}); update the driver, or use --backend ort"
            ) from None
        self.engine = self._runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise BuildError(
                f"the engine does not load ({self.messages.first()}): it was built for another TensorRT version or "
                "another GPU; build the bundle again"
            )
        self.names = frozenset(self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors))
        self.activation_bytes = int(self.engine.device_memory_size_v2)

    def context(self, activations: int, *, one_shape: bool) -> "TrtContext":
        """Return a new execution context.

        Args:
            activations: address of `activation_bytes` bytes of GPU memory.
            one_shape: make TensorRT-RTX compile the kernels for a shape before it runs. Otherwise it runs generic
                kernels meanwhile, and a captured step would replay those forever.

        Raises:
            BuildError: TensorRT cannot create the context.
        """
        trt, strategy = self.trt, self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.messages.clear()
        if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):  # TensorRT-RTX
            config = self.engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            if one_shape:
                eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
                config.dynamic_shapes_kernel_specialization_strategy = eager
            context = self.engine.create_execution_context(config)
        else:
            context = self.engine.create_execution_context(strategy)
        if context is None:
            raise BuildError(
                f"TensorRT cannot create an execution context ({self.messages.first()}); free memory on the GPU"
            )
        context.set_device_memory(activations, self.activation_bytes)
        return TrtContext(self, context)


class TrtContext:
    """An execution context of an engine; `TrtEngine.context` creates it."""

    def __init__(self, engine: TrtEngine, context: Any) -> None:
        self._engine, self._context = engine, context
        self._shapes: dict[str, tuple[int, ...]] = {}

    def place(self, name: str, address: int, shape: tuple[int, ...], dtype: "np.dtype[Any]") -> None:
        """Bind a tensor to an address, after checking rank, fixed sizes and dtype against the engine.

        Raises:
            BuildError: the engine's tensor differs.
        """
        engine, exists = self._engine.engine, name in self._engine.names
        sizes = tuple(engine.get_tensor_shape(name)) if exists else ()
        fits = len(sizes) == len(shape) and all(a in (-1, b) for a, b in zip(sizes, shape, strict=True))
        fits = fits and engine.get_tensor_dtype(name) == getattr(self._engine.trt.DataType, _TYPES[dtype.name])
        if not (exists and fits and self._context.set_tensor_address(name, address)):
            raise BuildError(f"the engine and the manifest differ in {name}; build the bundle again")

    def shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Set the shape of an input if it differs from the current one.

        Raises:
            BuildError: the engine refuses the shape.
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
        """Return whether a run can be captured; regular TensorRT cannot tell before it fails."""
        return not hasattr(self._context, "is_stream_capturable") or self._context.is_stream_capturable(stream)

    def enqueue(self, stream: int) -> str:
        """Start a run; return why it fails, or an empty text."""
        self._engine.messages.clear()
        return "" if self._context.execute_async_v3(stream) else self._engine.messages.first()
