"""A small graph builder on onnx-ir: names every node and value, stores weights outside the graph."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from coatrt.configs.lora_contract import ACTIVATIONS
from coatrt.errors import ConfigError
from coatrt.export.weight_file import WEIGHTS_FILE, WeightFile

__all__ = ["IR_VERSION", "OPEN_POSITIONS", "OPSET", "TORCH_DTYPES", "GraphBuilder", "GraphForm", "Nodes"]

OPSET = 24  # the first with TensorScatter and Swish
IR_VERSION = 11
OPEN_POSITIONS = 32768
"""Default limit on the rows of the rotary tables in forms with an open cache length."""
_RUNTIME_DOMAIN = "com.microsoft"
_INLINE_BYTES = 1024
_DTYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class GraphForm:
    """How a model is written as a graph for one kind of runtime.

    Args:
        name: "engine" for TensorRT (quantized constants are read by DequantizeLinear only), "cpu" for ONNX Runtime, or
            "cuda" for its CUDA provider (every node runs on the GPU, so that a step can be captured as a CUDA graph).
        file: name of the graph file.
        activations: dtype of activations, caches and LoRA inputs. engine: float32, float16 or bfloat16; cpu: float32 or
            float16; cuda: float16.
        cache_length: slots of each KV cache; None leaves the length open (not in the engine form).
        max_positions: limit on the rows of the rotary tables if the cache length is open; the model's own limit applies
            too. With a cache length there is one row per slot.

    Raises:
        ConfigError: the combination is not supported.
    """

    name: Literal["engine", "cpu", "cuda"]
    file: str
    activations: str
    cache_length: int | None = None
    max_positions: int = OPEN_POSITIONS

    def __post_init__(self) -> None:
        allowed = {"engine": ACTIVATIONS, "cpu": ("float32", "float16"), "cuda": ("float16",)}
        if self.name not in allowed:
            raise ConfigError(f"graph form must be one of {', '.join(allowed)}, got {self.name!r}")
        if self.activations not in allowed[self.name]:
            raise ConfigError(
                f"activations of the {self.name} form must be one of {', '.join(allowed[self.name])}, "
                f"got {self.activations}"
            )
        if self.name == "engine" and self.cache_length is None:
            raise ConfigError("the engine form needs a fixed cache length; give one, such as 2048")
        if (self.cache_length is not None and self.cache_length < 1) or self.max_positions < 1:
            raise ConfigError(
                f"cache_length and max_positions must be at least 1, got {self.cache_length} and {self.max_positions}"
            )


class Nodes:
    """A graph under construction; callers name every value, and a node is named after its output."""

    def __init__(self) -> None:
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._initializers: list[ir.Value] = []
        self._names: set[str] = set()

    def _claim(self, name: str) -> str:
        assert name not in self._names, f"the name {name} is taken"
        self._names.add(name)
        return name

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """Add a graph input and return it; a dimension given by name is dynamic."""
        value = ir.Value(name=self._claim(name), type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Make `value` a graph output under its own name."""
        value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
        self._outputs.append(value)

    def op(self, op_type: str, inputs: Sequence[ir.Value | None], name: str, **attributes: Any) -> ir.Value:
        """Add one node and return its output; both are named `name`."""
        value = ir.Value(name=self._claim(name))
        self._nodes.append(ir.node(op_type, inputs, attributes, outputs=[value], name=name))
        return value

    def initializer(self, data: ir.TensorProtocol, name: str) -> ir.Value:
        """Add an initializer and return it."""
        value = ir.Value(
            name=self._claim(name), type=ir.TensorType(data.dtype), shape=ir.Shape(data.shape.numpy()), const_value=data
        )
        self._initializers.append(value)
        return value

    def model(self, name: str, **domains: int) -> ir.Model:
        """Return the model; `domains` gives the versions of operator domains other than ONNX's own."""
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=self._initializers,
            opset_imports={"": OPSET, **domains},
            name=name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="coatrt")


class GraphBuilder(Nodes):
    """A decoder graph under construction.

    Args:
        form: the form to write.
        weights: the open weights file.
    """

    def __init__(self, form: GraphForm, weights: WeightFile) -> None:
        super().__init__()
        self.form = form
        self.activations = _DTYPES[form.activations]
        self._weights = weights
        self._constants: dict[str, ir.Value] = {}

    @property
    def is_engine(self) -> bool:
        """Whether this is the TensorRT form."""
        return self.form.name == "engine"

    @property
    def is_cuda(self) -> bool:
        """Whether this is the form of ONNX Runtime's CUDA provider."""
        return self.form.name == "cuda"

    def runtime_op(
        self, op_type: str, inputs: Sequence[ir.Value | None], names: Sequence[str], **attributes: Any
    ) -> list[ir.Value]:
        """Add one node of ONNX Runtime's own operators (domain com.microsoft) and return its outputs.

        The outputs are named `names`, and the node like the first of them. An empty name omits that output.
        """
        assert not self.is_engine, f"TensorRT has no {op_type}"
        outputs = [ir.Value(name=self._claim(name) if name else "") for name in names]
        self._nodes.append(ir.node(op_type, inputs, attributes, domain=_RUNTIME_DOMAIN, outputs=outputs, name=names[0]))
        return outputs

    def split(self, value: ir.Value, widths: Mapping[str, int]) -> list[ir.Value]:
        """Split the last axis of a value into parts; `widths` maps their names to their widths."""
        outputs = [ir.Value(name=self._claim(name)) for name in widths]
        sizes = self.ints(*widths.values())
        self._nodes.append(ir.node("Split", [value, sizes], {"axis": -1}, outputs=outputs, name=outputs[0].name))
        return outputs

    def store(
        self, name: str, tensor: torch.Tensor, dtype: ir.DataType, shape: Sequence[int] | None = None
    ) -> ir.Value:
        """Add an initializer whose bytes are stored in the weights file, and return it.

        Args:
            name: name of the initializer.
            tensor: contiguous data; sub-byte dtypes must be packed, low bits first.
            dtype: dtype of the data in the graph.
            shape: shape of the data in the graph; by default the tensor's own.
        """
        offset, length = self._weights.add(tensor)
        dims = ir.Shape(tuple(tensor.shape) if shape is None else tuple(shape))
        data = ir.ExternalTensor(
            WEIGHTS_FILE, offset, length, dtype, shape=dims, name=name, base_dir=self._weights.directory
        )
        return self.initializer(data, name)

    def small(self, name: str, tensor: torch.Tensor) -> ir.Value:
        """Add a norm, bias or rotary table as an initializer in the activations' dtype, and return it."""
        return self.store(name, tensor.to(TORCH_DTYPES[self.form.activations]).contiguous(), self.activations)

    def constant(self, array: NDArray[Any]) -> ir.Value:
        """Return a small constant; equal arrays share one initializer."""
        digest = hashlib.sha256(array.tobytes()).hexdigest()[:12]
        name = f"constant.{array.dtype}.{'x'.join(map(str, array.shape))}.{digest}"
        if array.size <= 8 and array.dtype.kind == "i":
            name = f"constant.{array.dtype}{list(array.shape)}.{'_'.join(map(str, array.flat))}"
        if name not in self._constants:
            tensor = ir.tensor(array, name=name)
            if array.nbytes > _INLINE_BYTES:
                raw = torch.from_numpy(np.frombuffer(array.tobytes(), np.uint8).copy())
                self._constants[name] = self.store(name, raw, tensor.dtype, array.shape)
            else:
                self._constants[name] = self.initializer(tensor, name)
        return self._constants[name]

    def ints(self, *values: int) -> ir.Value:
        """Return a 1-D int64 constant."""
        return self.constant(np.array(values, np.int64))

    def real(self, values: float | NDArray[np.float32]) -> ir.Value:
        """Return a constant rounded to the activations' dtype."""
        return self.constant(np.asarray(values, np.float32).astype(self.activations.numpy()))

    def cast(self, value: ir.Value, name: str) -> ir.Value:
        """Return `value` cast to the activations' dtype; an initializer of that dtype is returned as it is."""
        if value.dtype == self.activations:
            return value
        return self.op("Cast", [value], name, to=self.activations)

    def rounded(self, op_type: Literal["Add", "Mul"], left: ir.Value, right: ir.Value, name: str) -> ir.Value:
        """Return left + right or left × right, rounded once to the activations' dtype.

        ONNX Runtime has no float16 arithmetic on the CPU: it would compute a chain of operators in float32 and not fold
        it. Explicit casts keep each rounding and fold. The float32 product or sum of two float16 numbers, rounded to
        float16, equals the float16 result, as float32 has 24 ≥ 2·11 + 2 significand bits (Figueroa 1995).
        """
        if self.is_engine or self.activations != ir.DataType.FLOAT16:
            return self.op(op_type, [left, right], name)
        wide = [
            self.op("Cast", [value], f"{name}.{side}", to=ir.DataType.FLOAT)
            for value, side in ((left, "left"), (right, "right"))
        ]
        return self.op("Cast", [self.op(op_type, wide, f"{name}.wide")], name, to=ir.DataType.FLOAT16)

    def save(self, directory: Path) -> None:
        """Write the graph file into `directory`, beside its weights file."""
        domains = {} if self.is_engine else {_RUNTIME_DOMAIN: 1}
        ir.save(self.model("decoder", **domains), directory / self.form.file)
