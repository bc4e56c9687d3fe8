"""The tables of docs/evidence/planning.md on the planner's constants, see `tables.py`."""

from typing import Any

from markdown_tables import grid, load

__all__ = ["LATENCY_TABLES"]


def _name(key: str) -> str:
    """Return "1B mixed, LoRA" of backend/speed/1b/mixed/lora."""
    _, _, model, text, lora = key.split("/")
    return f"{model.upper()} {text}, {'LoRA' if lora == 'lora' else 'no LoRA'}"


def _percent(value: float) -> str:
    return f"{100 * value:+.1f} %"


def latency_constants() -> str:
    """What was measured, and what it comes to."""
    found: dict[str, Any] = load("latency_constants")["constants"]

    def micro(seconds: float) -> str:
        return f"{1e6 * seconds:.2f} µs"

    def product(floor: float, each: float) -> str:
        return f"{micro(floor)} + {1e9 * each:.2f} ns per input"

    def percent(share: float) -> str:
        return f"{100 * share:.3g} % of the FP16 peak"

    def packed(one: dict[str, float]) -> str:
        fixed = product(one["floor_seconds"], one["input_seconds"])
        return f"{fixed} + 2·N·K FLOPs at {percent(one['flops_share'])}"

    doubling, output = micro(found["lora_doubling_seconds"]), f"{1e9 * found['lora_output_seconds']:.2f} ns"
    lora = f"{micro(found['lora_seconds'])} + {doubling} × log₂ K + {output} per output"
    rows = [
        ["bandwidth", f"{100 * found['bandwidth_share']:.0f} % of the peak", "products of one row"],
        ["float16 product", product(found["floor_seconds"], found["input_seconds"]), "products of one row"],
        ["each row of it", f"2·N·K FLOPs at {percent(found['flops_share'])}", "products of 128 and 1,024 rows"],
        ["int4 product", packed(found["packed"]["int4"]), "products of one row"],
        ["int8 product", packed(found["packed"]["int8"]), "products of one row"],
        ["LoRA of a matrix", lora, "groups with and without LoRA"],
        ["kernel that is not a product", micro(found["kernel_seconds"]), "whole steps"],
        ["logits to the host", f"{1e9 * found['host_seconds_per_byte']:.2f} ns per byte", "whole steps"],
        ["node of a prompt", f"{micro(found['launch_seconds'])} by the host", "prompts of 135M"],
    ]
    gpus = " and ".join(found["gpus"])
    return f"{grid(['constant', 'measured', 'fitted to'], rows)}\n\n{gpus}, {found['runtime']}, SM{found['sm']}."


def latency_held_out() -> str:
    """Predicted and measured decode steps, those that the fit has not seen first."""
    found = load("latency_constants")
    steps = [row for row in found["rows"] if row["key"].startswith("backend/")]
    rows = [
        [
            _name(row["key"]),
            "yes" if row["seen"] else "no",
            f"{row['measured_ms']:.2f}",
            f"{row['predicted_ms']:.2f}",
            _percent(row["error"]),
            _percent(row["error_without_7b"]),
        ]
        for row in sorted(steps, key=lambda row: row["seen"])
    ]
    head = ["step on the H100", "in the fit", "measured ms", "predicted ms", "error", "error, no row of 7B in the fit"]
    errors = {
        way: [100 * row["error"] for row in found["rows"] if row["key"].endswith(f"/{way}")]
        for way in ("separate", "joined")
    }
    apart, joined = errors["separate"], errors["joined"]
    prompts = [100 * row["error"] for row in found["prompts"] if not row["seen"]]
    of_1b = [100 * error for error in found["errors_of_1b_without_1b"].values()]
    return (
        f"{grid(head, rows)}\n\nSteps that the fit has not seen: {100 * found['worst_held_out']:.1f} % at worst, "
        f"{100 * found['worst_held_out_without_7b']:.1f} % without any row of 7B.\n"
        f"The {len(apart)} steps of the hand-written graph with matrices apart, on both GPUs and by CUDA events: "
        f"{min(apart):+.1f} to {max(apart):+.1f} %; its {len(joined)} steps with them joined, as cuda.onnx has them: "
        f"{min(joined):+.1f} to {max(joined):+.1f} %.\n"
        f"Prompts of 512 tokens that the fit has not seen: {min(prompts):+.0f} to {max(prompts):+.0f} %.\n"
        f"Without any row of 1B instead, its steps: {min(of_1b):+.1f} to {max(of_1b):+.1f} %. Its vocabulary is the "
        "largest, and what its logits take to the host shows in no other row."
    )


def gpu_calibrate() -> str:
    """Random configurations on a GPU, predicted by its own timings and by the planner's constants."""
    lines = []
    for gpu in ("h100", "h200"):
        for row in load(f"gpu/{gpu}")["rows"]:
            if not row["key"].startswith("calibrate/") or "measured_ms" not in row:
                continue
            _, model, name, lora = row["key"].split("/")
            errors = [row.get(f"{way}_error") for way in ("timings", "constants")]
            lines.append(
                [
                    f"{gpu.upper()}, {model.upper()} {name}, {'LoRA' if lora == 'lora' else 'no LoRA'}",
                    f"{row['bits']:.2f}",
                    f"{row['measured_ms']:.2f}",
                    *(_percent(error) if error is not None else "" for error in errors),
                ]
            )
    if not lines:
        return "Not measured yet."
    return grid(["step", "bits per weight", "measured ms", "error by timings", "by constants"], lines)


LATENCY_TABLES = {maker.__name__: maker for maker in (latency_constants, latency_held_out, gpu_calibrate)}
