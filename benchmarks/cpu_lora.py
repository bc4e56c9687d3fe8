"""The LoRA products of a decode step on the CPU, its tensors in float32, float16 and int8.

python benchmarks/cpu_lora.py

Shapes of SmolLM2-135M, rank 16, one token, one thread, seconds of that thread. float16 is cast in the graph, int8
multiplied by DynamicQuantizeMatMul. They are inputs of the graph, so none is packed when the graph loads.
"""

import statistics
import time
from typing import Any

import numpy as np
import onnxruntime as ort
from common import save_result, smollm2
from onnx import TensorProto, helper

from coatrt.configs.lora_contract import contract_for

ROUNDS = 20
TYPES = {
    "float32": (TensorProto.FLOAT, np.float32),
    "float16": (TensorProto.FLOAT16, np.float16),
    "int8": (TensorProto.INT8, np.int8),
}


def session(shapes: dict[str, tuple[int, int]], kind: str) -> tuple[Any, Any]:
    """Return a session with one product for each tensor, and its bindings."""
    rng, feeds = np.random.default_rng(0), {}
    inputs, outputs, nodes = [], [], []
    onnx_type, dtype = TYPES[kind]
    for name, (K, N) in shapes.items():
        inputs += [helper.make_tensor_value_info(f"{name}.x", TensorProto.FLOAT, [1, 1, K])]
        inputs += [helper.make_tensor_value_info(name, onnx_type, [K, N])]
        outputs += [helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, [1, 1, N])]
        feeds[f"{name}.x"] = rng.standard_normal((1, 1, K)).astype(np.float32)
        feeds[name] = (rng.standard_normal((K, N)) * (30 if kind == "int8" else 1)).astype(dtype)
        read = [f"{name}.x", name]
        if kind == "int8":
            inputs.append(helper.make_tensor_value_info(f"{name}.scale", TensorProto.FLOAT, [N]))
            feeds[f"{name}.scale"] = np.full(N, 0.01, np.float32)
            read.append(f"{name}.scale")
            nodes.append(helper.make_node("DynamicQuantizeMatMul", read, [f"{name}.y"], domain="com.microsoft"))
            continue
        if kind == "float16":
            nodes.append(helper.make_node("Cast", [name], [f"{name}.wide"], to=TensorProto.FLOAT))
            read[1] = f"{name}.wide"
        nodes.append(helper.make_node("MatMul", read, [f"{name}.y"]))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph(nodes, "lora", inputs, outputs), opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value))
    for output in outputs:
        binding.bind_output(output.name)
    return session, binding


def main() -> None:
    """Measure in alternation, with empty caches."""
    shapes = dict(contract_for(smollm2().matrices, 16, 32).inputs)
    sessions = {kind: session(shapes, kind) for kind in TYPES}
    seconds: dict[str, list[float]] = {kind: [] for kind in TYPES}
    other = np.zeros(64 << 20, np.uint8)
    for number in range(-2, ROUNDS):
        for kind, (inference, binding) in sessions.items():
            other += 1
            start = time.thread_time()
            inference.run_with_iobinding(binding)
            if number >= 0:
                seconds[kind].append(time.thread_time() - start)
    milliseconds = {kind: 1e3 * statistics.median(values) for kind, values in seconds.items()}
    elements = sum(rows * columns for rows, columns in shapes.values())
    save_result(
        "cpu_lora", "python benchmarks/cpu_lora.py", {"products": len(shapes), "elements": elements, "ms": milliseconds}
    )


if __name__ == "__main__":
    main()
