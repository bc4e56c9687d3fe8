"""A small builder over onnx-ir: names every node and value, keeps weights outside the graph."""

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
"""Most rows of the rotary tables where the caches are open and no longer context is asked for."""
_RUNTIME_DOMAIN = "com.microsoft"
_INLINE_BYTES = 1024
_DTYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class GraphForm:
    """One way to write a model down, for one kind of runtime.

    Args:
        name: "engine" for TensorRT (quantized constants read by DequantizeLinear only), "cpu" for ONNX Runtime, or
            "cuda" for its CUDA provider (all of it on the GPU, so that a step can be captured as a CUDA graph).
        file: name of the graph file.
        activations: dtype of activations, caches and LoRA inputs; cpu: no bfloat16; cuda: float16.
        cache_length: slots of each key/value cache; None leaves them open (not in the engine form).
        max_positions: most rows of the rotary tables where the caches are open; the model's own limit lowers it. With a
            cache length there is a row per slot.

    Raises:
        ConfigError: the combination does not exist.
    """

    name: Literal["engine", "cpu", "cuda"]
    file: str
    activations: str
    cache_length: int | None = None
    max_positions: int = OPEN_POSITIONS

    def __post_init__(self) -> None:
        allowed = {"engine": ACTIVATIONS, "cpu": ("float32", "float16"), "cuda": ("float16",)}
        if self.name not in allowed:
            raise ConfigError(f"graph form {self.name!r} is given; allowed: {', '.join(allowed)}")
        if self.activations not in allowed[self.name]:
            raise ConfigError(
                f"{self.activations} activations are given for the {self.name} form; "
                f"allowed: {', '.join(allowed[self.name])}"
            )
        if self.name == "engine" and self.cache_length is None:
            raise ConfigError("the engine form has no cache length; give one, such as 2048: TensorRT needs it fixed")
        if (self.cache_length is not None and self.cache_length < 1) or self.max_positions < 1:
            raise ConfigError(
                f"cache length {self.cache_length} and {self.max_positions} positions are given; give positive numbers"
            )


class Nodes:
    """A graph under construction; every value is named by its caller, and a node is named after its output."""

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
        """Return a new graph input; a text dimension is dynamic."""
        value = ir.Value(name=self._claim(name), type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Make `value` a graph output under its own name."""
        value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
        self._outputs.append(value)

    def op(self, op_type: str, inputs: Sequence[ir.Value | None], name: str, **attributes: Any) -> ir.Value:
        """Add one node and return its output, both called `name`."""
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
        """Return the finished model, with the versions of operator domains beside ONNX's own."""
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
        weights: the open file that takes the weights.
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
        """Add one node of ONNX Runtime's own operators (domain com.microsoft) and return its outputs, called `names`.

        The node is called like the first of them; an output without a name is left out.
        """
        assert not self.is_engine, f"TensorRT has no {op_type}"
        outputs = [ir.Value(name=self._claim(name) if name else "") for name in names]
        self._nodes.append(ir.node(op_type, inputs, attributes, domain=_RUNTIME_DOMAIN, outputs=outputs, name=names[0]))
        return outputs

    def split(self, value: ir.Value, widths: Mapping[str, int]) -> list[ir.Value]:
        """Cut the last axis of a value into named parts of the given widths."""
        outputs = [ir.Value(name=self._claim(name)) for name in widths]
        sizes = self.ints(*widths.values())
        self._nodes.append(ir.node("Split", [value, sizes], {"axis": -1}, outputs=outputs, name=outputs[0].name))
        return outputs

    def store(
        self, name: str, tensor: torch.Tensor, dtype: ir.DataType, shape: Sequence[int] | None = None
    ) -> ir.Value:
        """Return an initializer whose bytes go to the weights file.

        Args:
            name: name of the initializer.
            tensor: contiguous data; sub-byte dtypes come packed, low bits first.
            dtype: what the bytes mean in the graph.
            shape: elements in the graph; the tensor's own shape by default.
        """
        offset, length = self._weights.add(tensor)
        dims = ir.Shape(tuple(tensor.shape) if shape is None else tuple(shape))
        data = ir.ExternalTensor(
            WEIGHTS_FILE, offset, length, dtype, shape=dims, name=name, base_dir=self._weights.directory
        )
        return self.initializer(data, name)

    def small(self, name: str, tensor: torch.Tensor) -> ir.Value:
        """Return a small tensor as an initializer in the activations' dtype."""
        return self.store(name, tensor.to(TORCH_DTYPES[self.form.activations]).contiguous(), self.activations)

    def constant(self, array: NDArray[Any]) -> ir.Value:
        """Return a small constant, the same one for equal content."""
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
        """Return `value` in the activations' dtype; nothing is added where an initializer has it already."""
        if value.dtype == self.activations:
            return value
        return self.op("Cast", [value], name, to=self.activations)

    def rounded(self, op_type: Literal["Add", "Mul"], left: ir.Value, right: ir.Value, name: str) -> ir.Value:
        """Return left + right or left × right, rounded once to the activations' dtype.

        ONNX Runtime has no float16 arithmetic on the CPU: it would keep a chain in float32, and would not fold it.
        Explicit casts keep each rounding and fold. A float32 product or sum of two float16 numbers, rounded to
        float16, is the float16 result: float32 has 24 ≥ 2·11 + 2 significand bits.
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
