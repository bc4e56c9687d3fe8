"""A fake of TensorRT on the fake driver: it runs an engine's source graph in ONNX Runtime on the CPU."""

import ctypes
import enum
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from coatrt.bundle import Bundle, seal
from support.fake_cuda import FakeDriver

__all__ = ["VERSION", "FakeContext", "FakeTensorRT", "add_engine"]

VERSION = "9.9"
ACTIVATION_BYTES = 512
STREAM = 11
_NUMPY = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(int64)": np.int64}


def add_engine(
    bundle: Path, directory: Path, *, sm: int = 89, batch: int = 2, prefill: int = 4, plan: bytes = b""
) -> Bundle:
    """Copy a bundle and add a fake engine, whose bytes are the path of its graph."""
    shutil.copytree(bundle, directory)
    (directory / "sm.engine").write_bytes(plan or str(directory / "base.onnx").encode())
    facts = {
        "file": "sm.engine",
        "sms": [sm],
        "builder": "tensorrt-rtx",
        "version": VERSION,
        "bytes": (directory / "sm.engine").stat().st_size,
        "seconds": 1.0,
        "shapes": {"batch": batch, "prefill": prefill, "logits": 1},
    }
    manifest = {k: v for k, v in Bundle.open(bundle).manifest.items() if k not in ("format", "coatrt", "files")}
    seal(directory, manifest | {"engines": [facts]})
    return Bundle.open(directory)


class _Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING = range(3)


class _Logger:
    Severity = _Severity


class FakeContext:
    """Runs a graph when the stream gets to it, with the tensor addresses at the time of enqueueing."""

    def __init__(self, engine: "_Engine", eager: bool) -> None:
        self.engine, self.eager = engine, eager
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.shaped = self.runs = 0
        self.memory: tuple[int, int] | None = None
        self.captured, self.ran_in = False, {}  # type: tuple[bool, dict[str, tuple[int, ...]]]

    def _changes(self) -> None:
        assert not self.captured, "a context must not change after a graph was captured from it"

    def set_device_memory(self, address: int, size: int) -> None:
        self._changes()
        assert address % 256 == 0
        self.memory = address, size

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._changes()
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._changes()
        self.shapes[name] = shape
        self.shaped += 1
        return all(size >= 1 for size in shape)

    def is_stream_capturable(self, stream: int) -> bool:
        assert stream == STREAM
        return self.engine.trt.capturable

    def execute_async_v3(self, stream: int) -> bool:
        trt, driver = self.engine.trt, self.engine.trt.driver
        assert stream == STREAM
        assert self.memory is not None
        assert self.memory[1] >= ACTIVATION_BYTES
        if driver.capture is not None:
            assert self.ran_in == self.shapes, "a plain run in the same shapes must come before a capture"
            if trt.refuses_capture:
                trt.logger.log(_Severity.ERROR, "operation not permitted\nwhen stream is capturing")
                return False
            self.captured = True
        elif trt.fails:
            trt.logger.log(_Severity.WARNING, "not this")
            trt.logger.log(_Severity.ERROR, "the first\n reason")
            trt.logger.log(_Severity.ERROR, "what follows from it")
            return False
        self.ran_in, self.runs = dict(self.shapes), self.runs + 1
        addresses, shapes, session = dict(self.addresses), dict(self.shapes), self.engine.session

        def work() -> None:
            feeds = {}
            for node in session.get_inputs():
                value = np.empty(shapes[node.name], _NUMPY[node.type])
                ctypes.memmove(value.ctypes.data, addresses[node.name], value.nbytes)
                feeds[node.name] = value
            names = [node.name for node in session.get_outputs()]
            for name, output in zip(names, session.run(names, feeds), strict=True):
                if name == "logits":
                    output[...] *= trt.factor
                ctypes.memmove(addresses[name], np.ascontiguousarray(output).ctypes.data, output.nbytes)

        driver.enqueue(work)
        return True


class _Engine:
    device_memory_size_v2 = ACTIVATION_BYTES

    def __init__(self, trt: "FakeTensorRT", graph: Path) -> None:
        self.trt = trt
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 4, 1
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        self.session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self.tensors = {node.name: node for node in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, number: int) -> str:
        return list(self.tensors)[number]

    def get_tensor_shape(self, name: str) -> list[int]:
        return [size if isinstance(size, int) else -1 for size in self.tensors[name].shape]

    def get_tensor_dtype(self, name: str) -> Any:
        names = {"tensor(float16)": "HALF", "tensor(float)": "FLOAT", "tensor(int64)": "INT64"}
        return self.trt.DataType[names[self.tensors[name].type]]

    def create_runtime_config(self) -> "_Config":
        assert hasattr(self.trt, "DynamicShapesKernelSpecializationStrategy")
        return _Config()

    def create_execution_context(self, how: Any) -> FakeContext | None:
        strategy = how.strategy if isinstance(how, _Config) else how
        assert strategy == "the user's"
        if self.trt.no_context:
            return None
        eager = isinstance(how, _Config) and how.dynamic_shapes_kernel_specialization_strategy == "eager"
        self.trt.contexts.append(FakeContext(self, eager))
        return self.trt.contexts[-1]


class _Config:
    strategy = ""
    dynamic_shapes_kernel_specialization_strategy = "lazy"

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy


class FakeTensorRT:
    """The module tensorrt_rtx or tensorrt; tests set its failures as attributes."""

    __version__ = VERSION
    ILogger = _Logger
    DataType = enum.Enum("DataType", ["FLOAT", "HALF", "BF16", "INT64"])

    class ExecutionContextAllocationStrategy:
        USER_MANAGED = "the user's"

    def __init__(self, driver: FakeDriver, *, rtx: bool = True) -> None:
        self.driver, self.contexts = driver, []  # type: tuple[FakeDriver, list[FakeContext]]
        self.capturable, self.refuses_capture, self.fails, self.no_context = True, False, False, False
        self.logger: Any = None
        self.factor = 1.0  # of the logits
        if rtx:
            self.DynamicShapesKernelSpecializationStrategy = type("Strategy", (), {"EAGER": "eager"})

    def Runtime(self, logger: Any) -> "FakeTensorRT":
        self.logger = logger
        return self

    def deserialize_cuda_engine(self, plan: bytes) -> _Engine | None:
        if not plan.endswith(b".onnx"):
            self.logger.log(_Severity.ERROR, "magicTag == kEXPECTED_MAGIC_TAG failed")
            return None
        return _Engine(self, Path(plan.decode()))
