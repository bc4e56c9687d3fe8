"""Fit the planner's constants of ONNX Runtime's CUDA provider to the GPU check, and predict held-out steps.

python benchmarks/latency_constants.py

Products, LoRA and prefill are fitted to the rows of the H200 and H100 in results/gpu; kernels and host to whole steps
of int4-g64 of two models. The steps of the third model, 7B, and of every mixed configuration are held out. A second fit
without any row of 7B, its products and LoRA too, predicts the same steps; a third one without any row of 1B predicts
those of 1B. Writes coatrt/planning/cuda_latency.json and results/latency_constants.json.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, save_result
from scipy.optimize import nnls

sys.path.insert(0, str(Path(__file__).parent / "gpu"))

from backend_models import MAPS, RandomModel
from decoder import MODELS
from groups import GROUPS
from operators import SHAPES

from coatrt.configs.config import QuantConfig
from coatrt.devices.profiles import DeviceProfile, device_profile
from coatrt.planning import cuda_latency
from coatrt.planning.cuda_latency import LAYER_KERNELS, OTHER_KERNELS, CudaConstants, CudaLatency, PackedProduct
from coatrt.planning.latency import products_seconds
from coatrt.planning.memory import Workload
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.json_data import read_as, to_data, write_json

BLOCKS = {"int4": ("int4-g32", "int4-g64", "int4-g128"), "int8": ("int8-g32", "int8-g64", "int8-g128")}
HELD_OUT, OTHER = "7b", "1b"
FILLED = 700
"""Slots that are filled on average while backend.py decodes: a prompt of 512, then some hundred steps."""

Row = dict[str, Any]


def rows_of(gpu: str) -> dict[str, Row]:
    """Return the rows of a GPU by key."""
    result = read_as(RESULTS / "gpu" / f"{gpu}.json", dict[str, Any], "result", "measure it again")
    return {row["key"]: row for row in result["rows"]}


H100, H200 = rows_of("h100"), rows_of("h200")


def relative_fit(inputs: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Return the least-squares coefficients of relative errors."""
    y = np.array(seconds)
    scaled = np.array(inputs) / y[:, None]
    return [float(value) for value in np.linalg.lstsq(scaled, np.ones(len(y)), rcond=None)[0]]


def products(texts: Iterable[str], rows: int, without: str) -> list[tuple[int, int, float]]:
    """Return (N, K, seconds) of the measured products with so many rows, those of a model left out."""
    points = []
    for name, (N, K) in SHAPES.items():
        for text in texts:
            row = H200.get(f"product/{name}/{text}/M{rows}")
            if row is not None and name.split("-")[0] != without:
                points.append((N, K, row["us"]["median"] * 1e-6))
    return points


def fitted_products(device: DeviceProfile, without: str) -> dict[str, Any]:
    """Return the constants of products."""
    assert device.bandwidth is not None and device.fp16_flops is not None
    one = products(["fp16"], 1, without)
    floor, per_input, read = relative_fit(
        [[1, K, 2 * N * K / device.bandwidth] for N, K, _ in one], [s for *_, s in one]
    )
    many = [(N, K, m, s) for m in (128, 1024) for N, K, s in products(["fp16"], m, without)]
    left = [s - floor - per_input * K - read * 2 * N * K / device.bandwidth for N, K, _, s in many]
    work = [2 * N * K * m / device.fp16_flops for N, K, m, _ in many]
    weights = [1 / s for *_, s in many]
    inverse = sum(w * w * a * b for w, a, b in zip(weights, work, left, strict=True)) / sum(
        w * w * a * a for w, a in zip(weights, work, strict=True)
    )
    packed = {}
    for kind, texts in BLOCKS.items():
        some = products(texts, 1, without)
        fixed, each, unpack = relative_fit(
            [[1, K, 2 * N * K / device.fp16_flops] for N, K, _ in some], [s for *_, s in some]
        )
        packed[kind] = PackedProduct(fixed, each, 1 / unpack, 0.0)
    return {
        "bandwidth_share": 1 / read,
        "flops_share": 1 / inverse,
        "floor_seconds": floor,
        "input_seconds": per_input,
        "packed": packed,
    }


def with_row_share(constants: CudaConstants, kind: str, share: float) -> CudaConstants:
    """Return the constants with another cost of each further row in a packed product."""
    packed = replace(constants.packed[kind], row_share=share)
    return replace(constants, packed={**constants.packed, kind: packed})


def fitted_rows(constants: CudaConstants, device: DeviceProfile, without: str) -> CudaConstants:
    """Return the constants with the cost of more rows in packed products, the best of a grid."""

    def error(candidate: CudaConstants, kind: str, some: Sequence[tuple[int, int, int, float]]) -> float:
        latency, fmt = CudaLatency(device, candidate), WeightFormat.parse(f"{kind}-g64")
        return float(np.mean([(latency.matrix_seconds(N, K, fmt, m) / s - 1) ** 2 for N, K, m, s in some]))

    for kind, texts in BLOCKS.items():
        some = [(N, K, m, s) for m in (4, 16) for N, K, s in products(texts, m, without)]
        candidates = [with_row_share(constants, kind, share) for share in np.arange(0, 3.01, 0.02).round(2).tolist()]
        errors = [error(one, kind, some) for one in candidates]
        constants = candidates[int(np.argmin(errors))]
    return constants


def fitted_lora(without: str) -> dict[str, Any]:
    """Return the constants of the LoRA: groups of matrices with their LoRA, less the groups without."""
    inputs, seconds, least = [], [], []
    for name, (K, widths) in GROUPS.items():
        if name.split("-")[0] == without:
            continue
        ways = [H200[f"group/{name}/M1/base separate/LoRA {way}"]["us"]["median"] for way in ("separate", "none")]
        inputs.append([len(widths), len(widths) * np.log2(K), sum(widths)])
        seconds.append((ways[0] - ways[1]) * 1e-6)
        least.append(K)
    constant, doubling, output = relative_fit(inputs, seconds)
    return {
        "lora_seconds": constant,
        "lora_doubling_seconds": doubling,
        "lora_output_seconds": output,
        "lora_least_input": min(least),
    }


def step_of(key: str) -> tuple[RandomModel, QuantConfig]:
    """Return the model and configuration of backend/speed/MODEL/MAP/LORA."""
    _, _, name, text, lora = key.split("/")
    model = RandomModel(MODELS[name], MAPS[text], lora == "lora")
    formats = {m.name: WeightFormat.parse(MAPS[text](m.layer, m.kind)) for m in model.matrices.matrices}
    return model, QuantConfig(formats)


def workload_of(model: RandomModel) -> Workload:
    """Return the workload of a random model's decoder with the slots of backend.py."""
    inner = max(matrix.K for matrix in model.matrices.targets if matrix.kind == "down_proj")
    lora = 0 if model.contract is None else 16 * sum(m.N + m.K for m in model.matrices.targets)
    return Workload(model._spec, inner, lora, 2048, 1, 512, 2)


def predicted(key: str, constants: CudaConstants, gpu: str, tokens: int = 1, joined: bool = False) -> float:
    """Return the predicted seconds of a step or a prompt; backend.py's graphs had separate matrices."""
    model, config = step_of(key)
    latency, work = CudaLatency(device_profile(gpu), constants, joined=joined), workload_of(model)
    products = products_seconds(latency, model.matrices, config, tokens, 1)
    return products + latency.rest_seconds(model.matrices, work, tokens, FILLED if tokens == 1 else tokens)


def fitted_steps(constants: CudaConstants, keys: Sequence[str]) -> CudaConstants:
    """Return the constants with those of kernels, host and launches, fitted to steps and prompts, none negative."""
    zero = replace(constants, kernel_seconds=0.0, host_seconds_per_byte=0.0, launch_seconds=0.0)
    inputs, seconds, launches = [], [], []
    for key in keys:
        model, _ = step_of(key)
        spec = model._spec
        measured = H100[key]["decode_ms"]["p50_ms"] * 1e-3
        inputs.append([(spec.layers * LAYER_KERNELS + OTHER_KERNELS) / measured, 4 * spec.vocabulary / measured])
        seconds.append(1 - predicted(key, zero, "h100") / measured)
        if "/135m/" in key:  # its prompt consists of launches alone
            targets = len(model.matrices.targets)
            nodes = spec.layers * cuda_latency.LAYER_NODES + targets * (4 if model.contract else 1) + OTHER_KERNELS
            launches.append(H100[key]["prefill_ms"]["p50_ms"] * 1e-3 / nodes)
    kernel, host = (float(value) for value in nnls(np.array(inputs), np.array(seconds))[0])
    return replace(zero, kernel_seconds=kernel, host_seconds_per_byte=host, launch_seconds=float(np.mean(launches)))


STEPS = tuple(key for key, row in H100.items() if key.startswith("backend/speed/") and "decode_ms" in row)


def fit_keys(without: str = HELD_OUT) -> tuple[str, ...]:
    """Return the steps of the fit: those of int4-g64 of all models but one."""
    return tuple(key for key in STEPS if "/int4-g64/" in key and f"/{without}/" not in key)


SEEN = fit_keys()
SEPARATE = tuple(
    (gpu, key)
    for gpu, rows in (("h100", H100), ("h200", H200))
    for key in rows
    if key.startswith("decode/") and key.endswith("/separate")
)
"""Steps of decoder.py in a graph that has the matrices apart, by CUDA events: no host in them."""
JOINED = tuple(
    (gpu, key)
    for gpu, rows in (("h100", H100), ("h200", H200))
    for key in rows
    if key.startswith("decode/") and key.endswith(("LoRA on/joined", "LoRA off/joined")) and "/int4-g64/" in key
)
"""Steps of decoder.py in a graph that joins them, as cuda.onnx does now; none is in the fit."""


def fitted(without: str = "") -> CudaConstants:
    """Return the constants fitted to all rows but the held-out steps and those of a model."""
    device = device_profile("h200")
    runtime = f"onnxruntime-gpu {read_as(RESULTS / 'gpu' / 'h200.json', dict, 'result', '')['machine']['onnxruntime']}"
    base = CudaConstants(
        sm=90,
        gpus=(device.name, device_profile("h100").name),
        runtime=runtime,
        kernel_seconds=0.0,
        host_seconds_per_byte=0.0,
        launch_seconds=0.0,
        **fitted_products(device, without),
        **fitted_lora(without),
    )
    constants = fitted_steps(base, fit_keys(without or HELD_OUT))
    return fitted_rows(constants, device, without)


def compared(
    key: str, measured: float, gpu: str, both: Sequence[CudaConstants], seen: bool, of: Callable[..., float]
) -> Row:
    """Return one step's measured and predicted milliseconds, by the fit and by the one without 7B."""
    ours, strict = (of(key, constants, gpu) for constants in both)
    return {
        "key": key,
        "gpu": gpu,
        "seen": seen,
        "measured_ms": round(measured * 1e3, 4),
        "predicted_ms": round(ours * 1e3, 4),
        "error": round(ours / measured - 1, 4),
        "error_without_7b": round(strict / measured - 1, 4),
    }


def main() -> None:
    """Fit, and write constants and errors."""
    both = [fitted(), fitted(HELD_OUT)]
    rows = [
        compared(key, H100[key]["decode_ms"]["p50_ms"] * 1e-3, "h100", both, key in SEEN, predicted) for key in STEPS
    ]

    def no_host(key: str, constants: CudaConstants, gpu: str) -> float:
        _, name, text, lora, _ = key.split("/")
        step = f"backend/speed/{name}/{text}/{'lora' if lora == 'LoRA on' else 'base'}"
        return predicted(step, replace(constants, host_seconds_per_byte=0.0), gpu, joined=key.endswith("/joined"))

    def prompt(key: str, constants: CudaConstants, gpu: str) -> float:
        return predicted(key, constants, gpu, 512)

    rows += [
        compared(key, rows_of(gpu)[key]["graph_ms"]["median"] * 1e-3, gpu, both, False, no_host)
        for gpu, key in (*SEPARATE, *JOINED)
    ]
    prompts = [
        compared(key, H100[key]["prefill_ms"]["p50_ms"] * 1e-3, "h100", both, key in SEEN and "135m" in key, prompt)
        for key in STEPS
    ]
    without_1b = fitted(OTHER)
    of_1b = {
        key: round(predicted(key, without_1b, "h100") / (H100[key]["decode_ms"]["p50_ms"] * 1e-3) - 1, 4)
        for key in STEPS
        if f"/{OTHER}/" in key
    }
    held_out = [row for row in rows if not row["seen"] and row["key"].startswith("backend/")]
    result = {
        "constants": _rounded(to_data(both[0])),
        "rows": rows,
        "prompts": prompts,
        "errors_of_1b_without_1b": of_1b,
        "worst_held_out": max(abs(row["error"]) for row in held_out),
        "worst_held_out_without_7b": max(abs(row["error_without_7b"]) for row in held_out),
    }
    for row in [*rows, *prompts]:
        print(row)
    path = Path(cuda_latency.__file__).with_suffix(".json")
    write_json(path, result["constants"])
    print(path.read_text())
    save_result("latency_constants", "python benchmarks/latency_constants.py", result)
    if result["worst_held_out_without_7b"] > 0.15:
        sys.exit("over the limit: 15 %")


def _rounded(value: Any) -> Any:
    """Return numbers with four digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return value


if __name__ == "__main__":
    main()
