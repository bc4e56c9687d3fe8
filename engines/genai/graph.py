"""A bundle's graph with the inputs of onnxruntime-genai: an attention mask in place of positions and indices.

onnxruntime-genai gives the tokens of a call and a mask over all positions so far. Prompts of a batch are padded on the
right. A few nodes in front compute from these what the graph takes:

1. A sequence begins to write at its mask's sum minus the tokens of the call, and at 0 in the first call, where the
   tokens of the call include the padding.
2. The last token that is not padding gets the logits.
3. Padding fills slots of the cache with values that no query reads: later tokens overwrite them.

The LoRA inputs get default values, so that they are optional: ONNX Runtime's adapters replace only optional inputs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coatrt.configs.lora_contract import DecoderIO
from coatrt.errors import BundleError
from coatrt.system.onnx_files import read_onnx

__all__ = ["LORA_FILE", "MASK", "attention_heads", "genai_graph"]

LORA_FILE = "lora.bin"
MASK = "attention_mask"
_ALIGNMENT = 64


def genai_graph(
    source: Path, io: DecoderIO, lora: Mapping[str, NDArray[Any]], directory: Path, *, all_logits: bool = False
) -> Any:
    """Return the graph for onnxruntime-genai, an `onnx.ModelProto`; write the default LoRA beside it.

    Args:
        source: the cpu or cuda form of a bundle's graph, its hash checked.
        io: its inputs and outputs.
        lora: the default value of each LoRA input, in the dtype of the activations.
        directory: where `LORA_FILE` is written.
        all_logits: return the logits of every token of a call instead of the last one's.

    Raises:
        BundleError: the graph has an input that is not known here, or lacks one or the logits.
    """
    import onnx

    found = read_onnx(source)  # refuses what is not a complete graph
    if len(found.outputs.get("logits", ())) != 3:
        raise BundleError(f"{source.name} has no logits [batch, tokens, vocabulary]; build the bundle again")
    model = onnx.load(source, load_external_data=False)
    graph = model.graph
    inputs = {value.name: value for value in graph.input}
    caches = [inputs[name] for name in io.past_names if name in inputs]
    front = _Front(graph, set(inputs) - set(lora) - set(io.past_names) - {"input_ids"}, all_logits)
    if front.unknown or len(caches) != len(io.past_names) or not set(lora) <= set(inputs):
        named = ", ".join(sorted(front.unknown)) or "other caches or LoRA inputs"
        raise BundleError(f"{source.name} has {named}, which its bundle does not name; build the bundle again")
    for name, value in lora.items():
        if found.inputs[name] != value.shape:
            shape = found.inputs[name]
            raise BundleError(f"{source.name}: {name} is {shape}, its bundle says {value.shape}; build it again")
    mask = onnx.helper.make_tensor_value_info(MASK, onnx.TensorProto.INT64, ["B", "total"])
    body = list(graph.node)
    for field in (graph.input, graph.node):
        del field[:]
    graph.input.extend([inputs["input_ids"], mask, *caches, *(inputs[name] for name in lora)])
    graph.node.extend([*front.nodes, *body])
    graph.initializer.extend(_defaults(lora, directory))
    logits = next(value for value in graph.output if value.name == "logits")
    tokens = logits.type.tensor_type.shape.dim[1]
    tokens.Clear()
    if all_logits:
        tokens.dim_param = "S"
    else:  # by this onnxruntime-genai sees that it gets the last token's only
        tokens.dim_value = 1
    return model


def attention_heads(model: Any) -> int:
    """Return the number of query heads of a graph.

    Raises:
        BundleError: it has no attention of ONNX Runtime's.
    """
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            for attribute in node.attribute:
                if attribute.name == "num_heads":
                    return int(attribute.i)
    raise BundleError("the graph has no GroupQueryAttention with num_heads; build the bundle again")


class _Front:
    """The nodes in front of a graph.

    Args:
        graph: gets their constants.
        needs: names of the inputs to compute.
        all_logits: whether every token of a call gets logits.
    """

    def __init__(self, graph: Any, needs: set[str], all_logits: bool) -> None:
        self._graph, self.nodes = graph, list[Any]()
        self._axis, self._one, self._zero = (
            self._constant("axis", [1]),
            self._constant("one", 1),
            self._constant("0", 0),
        )
        writers = {
            "position_ids": self._positions,
            "write_index": lambda: None,  # the other two are computed from it
            "seqlens_k": self._last_slots,
            "total_sequence_length": self._longest,
            "logits_index": self._every_index if all_logits else self._last_index,
            "logits_rows": self._every_row if all_logits else self._last_row,
        }
        self.unknown = needs - set(writers)
        self._add("ReduceSum", [MASK, self._axis], "genai.lengths", keepdims=0)  # [B]
        self._add("Shape", ["input_ids"], "genai.new", start=1, end=2)  # [1]
        self._add("Shape", ["input_ids"], "genai.batch", start=0, end=1)
        self._add("Squeeze", ["genai.new"], "genai.count")
        self._add("Range", [self._zero, "genai.count", self._one], "genai.range")  # [S]
        self._add("Sub", ["genai.lengths", "genai.new"], "genai.starts")
        self._add("Max", ["genai.starts", self._zero], "write_index")  # [B]
        for name in sorted(needs - self.unknown):
            writers[name]()

    def _add(self, op: str, inputs: list[str], output: str, **attributes: Any) -> None:
        import onnx

        self.nodes.append(onnx.helper.make_node(op, inputs, [output], name=output, **attributes))

    def _constant(self, name: str, value: Any) -> str:
        import onnx

        name = f"genai.constant.{name}"
        self._graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.int64), name))
        return name

    def _positions(self) -> None:
        self._add("Unsqueeze", ["write_index", self._axis], "genai.first")  # [B, 1]
        self._add("Add", ["genai.first", "genai.range"], "position_ids")  # [B, S]

    def _last_slots(self) -> None:
        import onnx

        self._add("Add", ["write_index", "genai.new"], "genai.ends")
        self._add("Sub", ["genai.ends", self._one], "genai.slots")
        self._add("Cast", ["genai.slots"], "seqlens_k", to=onnx.TensorProto.INT32)

    def _longest(self) -> None:
        """Write the length of the mask, which stays on the host, where the attention reads it."""
        import onnx

        self._add("Shape", [MASK], "genai.total", start=1, end=2)
        self._add("Squeeze", ["genai.total"], "genai.total.scalar")
        self._add("Cast", ["genai.total.scalar"], "total_sequence_length", to=onnx.TensorProto.INT32)

    def _last_index(self, output: str = "logits_index") -> None:
        self._add("Sub", ["genai.lengths", "write_index"], "genai.real")  # tokens of this call without padding
        self._add("Sub", ["genai.real", self._one], "genai.last")
        self._add("Unsqueeze", ["genai.last", self._axis], output)  # [B, 1]

    def _every_index(self) -> None:
        self._add("Shape", ["input_ids"], "genai.shape")
        self._add("Expand", ["genai.range", "genai.shape"], "logits_index")  # [B, S]

    def _last_row(self) -> None:
        """Write the last token's place among all B·S tokens."""
        self._last_index("genai.index")
        self._add("Squeeze", ["genai.batch"], "genai.sequences")
        self._add("Range", [self._zero, "genai.sequences", self._one], "genai.sequence")
        self._add("Mul", ["genai.sequence", "genai.new"], "genai.offsets")
        self._add("Unsqueeze", ["genai.offsets", self._axis], "genai.offset")
        self._add("Add", ["genai.index", "genai.offset"], "logits_rows")

    def _every_row(self) -> None:
        self._add("Mul", ["genai.batch", "genai.new"], "genai.tokens")
        self._add("Squeeze", ["genai.tokens"], "genai.tokens.scalar")
        self._add("Range", [self._zero, "genai.tokens.scalar", self._one], "genai.rows")
        self._add("Shape", ["input_ids"], "genai.shape")
        self._add("Reshape", ["genai.rows", "genai.shape"], "logits_rows")


def _defaults(lora: Mapping[str, NDArray[Any]], directory: Path) -> list[Any]:
    """Write the default values and return them as initializers; equal bytes are stored once, so zeros take little."""
    import onnx

    places: dict[bytes, int] = {}
    initializers = []
    zeros = max((value.nbytes for value in lora.values() if not value.any()), default=0)
    with (directory / LORA_FILE).open("wb") as stream:
        stream.write(bytes(zeros + -zeros % _ALIGNMENT))
        for name, value in lora.items():
            data = np.ascontiguousarray(value).tobytes()
            offset = 0 if not value.any() else places.setdefault(data, stream.tell())
            if offset == stream.tell():
                stream.write(data + bytes(-len(data) % _ALIGNMENT))
            tensor = onnx.TensorProto(name=name, dims=value.shape, data_location=onnx.TensorProto.EXTERNAL)
            tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
            entries = {"location": LORA_FILE, "offset": offset, "length": len(data)}
            for key, entry in entries.items():
                tensor.external_data.add(key=key, value=str(entry))
            initializers.append(tensor)
    return initializers
