"""The tables of docs/evidence/gpu.md, see `tables.py`."""

from typing import Any

from markdown_tables import grid, load

__all__ = ["GPU_TABLES"]

MODELS = ("135m", "1b", "7b")
FORMATS = ("fp16", "int8-g128", "fp8", "int4-g32", "int4-g64", "nvfp4", "mixed")


def _rows(gpu: str = "h200") -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in load(f"gpu/{gpu}")["rows"]}


def _bandwidth(rows: dict[str, dict[str, Any]]) -> float:
    """Return the bytes per second of a copy, read and written."""
    return 1e9 * float(rows["machine/bandwidth"]["copy_gb_s"]["median"])


def gpu_machine() -> str:
    """What was measured on, and its ceilings."""
    found, rows = load("gpu/h200")["machine"], _rows()
    launches = rows["machine/launches"]
    return (
        f"{found['gpu']} (SM{found['sm']}, {found['memory_gib']:.0f} GiB), driver {found['driver']}, torch "
        f"{found['torch']}, onnxruntime-gpu {found['onnxruntime']}. A device-to-device copy moves "
        f"{_bandwidth(rows) / 1e12:.2f} TB/s (read plus written); a float16 product of 8192³ runs at "
        f"{rows['machine/product/float16']['tflop_s']['median']:.0f} TFLOP/s; a small kernel costs "
        f"{launches['stream_us']['median']:.1f} µs in a stream and {launches['graph_us']['median']:.2f} µs in a "
        "replayed CUDA graph."
    )


def gpu_decode() -> str:
    """Tokens per second by format, and the share of the bandwidth they reach."""
    rows = _rows()
    ceiling = _bandwidth(rows)
    lines = []
    for text in FORMATS:
        cells = [text]
        for model in MODELS:
            row = rows[f"decode/{model}/{text}/LoRA off/joined"]
            share = row["bytes_per_token"] / row["graph_ms"]["median"] * 1e3 / ceiling
            cells += [f"{row['tokens_per_s']:.0f}", f"{100 * share:.0f} %"]
        lines.append(cells)
    head = ["format", *(cell for name in ("135M", "1B", "7B") for cell in (f"{name} tokens/s", "bandwidth"))]
    return grid(head, lines)


def gpu_memory() -> str:
    """Memory, prefill and loading by format."""
    rows = _rows()
    lines = []
    for text in FORMATS:
        cells = {model: rows[f"decode/{model}/{text}/LoRA off/joined"] for model in MODELS}
        lines.append(
            [
                text,
                *(f"{cell['peak_mb'] / 1e3:.2f}" for cell in cells.values()),
                *(f"{cells[model]['prefill_ms']['median']:.1f}" for model in ("1b", "7b")),
                f"{cells['7b']['load_s']:.1f}",
            ]
        )
    head = ["format", "135M GB", "1B GB", "7B GB", "prefill of 512, 1B ms", "7B ms", "load, 7B s"]
    return grid(head, lines)


def gpu_forms() -> str:
    """Milliseconds of a step by the form of the graph."""
    rows = _rows()
    forms = {
        "no LoRA": "LoRA off/joined",
        "no LoRA, matrices separate": "LoRA off/separate",
        "LoRA": "LoRA on/joined",
        "LoRA, matrices separate": "LoRA on/separate",
        "LoRA, folded into the norm": "LoRA on/joined/folded",
        "LoRA in fp8, folded into the norm": "LoRA on/joined/fp8/folded",
        "LoRA in int8": "LoRA on/joined/int8",
        "no LoRA, flash decoding": "LoRA off/joined/ORT_ENABLE_XQA=0/ORT_ENABLE_CUDNN_FLASH_ATTENTION=0",
        "no LoRA, cuDNN attention": "LoRA off/joined/ORT_ENABLE_XQA=0/ORT_ENABLE_CUDNN_FLASH_ATTENTION=1",
    }
    lines = [
        [
            label,
            *(f"{rows[f'decode/{model}/int4-g64/{form}']['graph_ms']['median']:.2f}" for model in MODELS),
            f"{rows.get(f'kernels/decode/7b/int4-g64/{form}', {}).get('kernels', 0):.0f}",
        ]
        for label, form in forms.items()
    ]
    return grid(["int4-g64", "135M ms", "1B ms", "7B ms", "kernels, 7B"], lines)


def gpu_rival() -> str:
    """The same step in torch.compile, and prefill."""
    rows = _rows()
    lines = []
    for model in ("135m", "1b"):
        rival, ours = rows[f"torch.compile/{model}/fp16"], f"decode/{model}/"
        cells = [
            rows[f"{ours}{text}"]
            for text in ("fp16/LoRA off/joined", "int4-g64/LoRA off/joined", "int4-g64/LoRA on/joined")
        ]
        lines.append(
            [
                model.upper(),
                f"{rival['tokens_per_s']:.0f}",
                *(f"{cell['tokens_per_s']:.0f}" for cell in cells),
                f"{rival['compile_s']:.0f}",
                f"{cells[0]['load_s']:.1f}",
            ]
        )
    head = ["tokens/s", "torch.compile fp16", "ONNX Runtime fp16", "int4-g64", "int4-g64, LoRA", "compile s", "load s"]
    return grid(head, lines)


def gpu_products() -> str:
    """Microseconds of one large matrix by format and rows."""
    rows = _rows()
    ceiling = _bandwidth(rows)
    texts = (
        "fp16",
        "int8-g128",
        "fp8",
        "int4-g32",
        "int4-g64",
        "int4-g128",
        "int4-g32+cutlass",
        "nvfp4",
        "nf4-g64",
        "int2-g64",
    )
    lines = []
    for text in texts:
        cells = [rows[f"product/7b-gate_up/{text}/M{m}"] for m in (1, 4, 16, 128, 1024)]
        share = cells[0]["gb_s"] * 1e9 / ceiling
        lines.append([text, *(f"{cell['us']['median']:.0f}" for cell in cells), f"{100 * share:.0f} %"])
    return grid(["µs", "1 row", "4", "16", "128", "1,024", "bandwidth, 1 row"], lines)


def gpu_groups() -> str:
    """Microseconds of a group of matrices, joined or apart, with and without LoRA."""
    rows = _rows()
    ways = (
        "base separate/LoRA none",
        "base joined/LoRA none",
        "base separate/LoRA separate",
        "base joined/LoRA joined A",
        "base joined/LoRA joined",
    )
    names = ("135m-qkv", "135m-gate_up", "1b-qkv", "1b-gate_up", "7b-qkv", "7b-gate_up")
    lines = [
        [
            name.replace("-", " ")
            .replace("m ", "M ")
            .replace("b ", "B ")
            .replace("qkv", "q, k, v")
            .replace("gate_up", "gate, up"),
            *(f"{rows[f'group/{name}/M1/{way}']['us']['median']:.1f}" for way in ways),
        ]
        for name in names
    ]
    return grid(["µs, 1 row", "separate", "joined", "LoRA, separate", "LoRA, A joined", "LoRA, A and B joined"], lines)


def gpu_attention() -> str:
    """Microseconds of attention for one token."""
    rows = _rows()
    heads = {"135m": "9/3 × 64", "1b": "32/8 × 64", "7b": "32/8 × 128", "llama2-7b": "32/32 × 128"}
    lines = []
    for name, label in heads.items():
        base = f"attention/{name}/4096 slots/"
        inside = [rows[f"{base}{filled} filled/rotary inside"]["us"]["median"] for filled in (128, 1024, 4095)]
        before = rows[f"{base}1024 filled/rotary before"]["us"]["median"]
        lines.append([label, *(f"{value:.1f}" for value in inside), f"{before:.1f}"])
    return grid(["heads × dimensions", "128 filled", "1,024", "4,095", "1,024, rotary before"], lines)


def gpu_graphs() -> str:
    """Coatrt's own graphs."""
    rows = _rows()
    lines = []
    for key, row in rows.items():
        root, text, *rest = key.split("/")
        if root != "graphs" or rest != ["float16"]:
            continue
        fused = row["nodes"]["CUDA"].get("MatMulNBits", 0)
        wide = rows[f"graphs/{text}/float32"]
        lines.append(
            [
                text,
                "MatMulNBits" if fused else "float16, decoded at load",
                f"{row['relative_error']:.1e}",
                f"{row['relative_error_cpu']:.1e}",
                f"{wide['relative_error']:.1e}",
            ]
        )
    return grid(["format", "weights on the GPU", "float16 form", "the same on the CPU", "float32 form"], lines)


def gpu_today() -> str:
    """A step of the exported graph, without and with a CUDA graph."""
    rows = _rows()
    lines = [
        [text, f"{row['no_graph_us'] / 1e3:.2f}", f"{row['graph_us'] / 1e3:.2f}", f"{row['relative_error']:.1e}"]
        for text in ("fp16", "int4-g64")
        for row in [rows[f"smollm2/{text}/replayed"]]
    ]
    return grid(["SmolLM2-135M, LoRA", "no CUDA graph ms", "CUDA graph ms", "difference of logits"], lines)


def gpu_switch() -> str:
    """What a change of the LoRA costs."""
    rows = _rows()
    lines = []
    for model in MODELS:
        row = rows[f"decode/{model}/int4-g64/LoRA on/joined"]
        ways = [row[f"switch_{way}_ms"]["median"] for way in ("tensors", "buffer", "device")]
        lines.append([model.upper(), f"{row['lora_bytes'] / 1e6:.0f}", *(f"{value:.2f}" for value in ways)])
    return grid(["model", "LoRA MB", "tensor by tensor ms", "one buffer ms", "within the GPU ms"], lines)


def _linear_keys(model: str, kind: str, cudnn: bool, lora: str) -> tuple[str, str]:
    """Return the keys of a step with the kernels of linear.py and with ONNX Runtime's operators."""
    ours, theirs = f"linear/{model}/{kind}/LoRA {lora}", f"decode/{model}/{kind}-g64/LoRA {lora}/joined"
    if cudnn:
        ours += "".join(f"/{name}" for name in CUDNN)
        theirs += "".join(f"/{name}={value}" for value, name in enumerate(CUDNN))
    return ours, theirs


CUDNN = ("ORT_ENABLE_XQA", "ORT_ENABLE_CUDNN_FLASH_ATTENTION")
"""What chooses cuDNN's attention: set to 0 and 1."""


def gpu_linear() -> str:
    """Milliseconds of a step with packed products that add the LoRA, and with ONNX Runtime's operators."""
    rows = _rows("h100")
    ceiling = _bandwidth(rows)
    lines = []
    for label, model, kind, cudnn in (
        ("135M int4", "135m", "int4", False),
        ("1B int4", "1b", "int4", False),
        ("7B int4", "7b", "int4", False),
        ("7B int4, cuDNN attention", "7b", "int4", True),
        ("135M nf3", "135m", "nf3", False),
        ("7B nf3, cuDNN attention", "7b", "nf3", True),
    ):
        keys = [_linear_keys(model, kind, cudnn, lora) for lora in ("off", "on")]
        found = [rows.get(key) for key in (keys[0][1], keys[1][1], keys[0][0], keys[1][0])]
        times = [row["graph_ms"]["median"] if row else None for row in found]
        off, on = times[2:]
        step = rows[keys[1][0]]
        share = step["bytes_per_token"] / step["graph_ms"]["median"] * 1e3 / ceiling
        lines.append(
            [
                label,
                *(f"{ms:.2f}" if ms else "" for ms in times),
                f"{100 * (on / off - 1):.0f} %" if on and off else "",
                f"{100 * share:.0f} %",
            ]
        )
    head = ["ms", "ONNX Runtime, no LoRA", "LoRA", "ours, no LoRA", "LoRA", "LoRA costs", "bandwidth"]
    return grid(head, lines)


def gpu_linear_facts() -> str:
    """What the table was measured on, and what it does not show."""
    machine, rows = load("gpu/h100")["machine"], _rows("h100")

    def costs(which: int) -> str:
        """Return how much longer steps are with LoRA: with our kernels (0), with ONNX Runtime's operators (1)."""
        pairs = [
            [rows.get(_linear_keys(model, "int4", cudnn, lora)[which]) for lora in ("on", "off")]
            for model in MODELS
            for cudnn in (False, True)
        ]
        shares = [on["graph_ms"]["median"] / off["graph_ms"]["median"] - 1 for on, off in pairs if on and off]
        return f"{100 * min(shares):.0f} to {100 * max(shares):.0f} %"

    ours, theirs = _linear_keys("7b", "int4", False, "on")
    kernels = rows[f"kernels/{_linear_keys('7b', 'int4', True, 'on')[0]}"]
    own = sum(count for name, count, _ in kernels["top"] if name.startswith("coatrt_"))
    prefill = [rows[key]["prefill_ms"]["median"] for key in (ours, theirs)]
    linear = {key: row for key, row in rows.items() if key.startswith("linear/")}
    consistency = max(row["decode_against_prefill"] for row in linear.values() if "decode_against_prefill" in row)
    errors = [row["relative_error"] for row in linear.values() if "relative_error" in row]
    against = (
        f"The largest relative error of {len(errors)} products against torch in float32 is {max(errors):.1e}."
        if errors
        else "Products alone were not compared with torch in this run."
    )
    return (
        f"{machine['gpu']}, driver {machine['driver']}, onnxruntime-gpu {machine['onnxruntime']}; a copy moves "
        f"{_bandwidth(rows) / 1e12:.2f} TB/s. LoRA makes an int4 step {costs(0)} longer, with ONNX Runtime's operators "
        f"{costs(1)}. A 7B step in int4 with LoRA is {kernels['kernels']:.0f} kernels, {own:.0f} of them ours, against "
        f"{rows[f'kernels/{theirs}']['kernels']:.0f} with ONNX Runtime's operators. A prefill of 512 tokens takes "
        f"{prefill[0]:.0f} ms against {prefill[1]:.0f} ms. Logits of a step differ from those of the same tokens as a "
        f"prompt by at most {consistency:.1e} of the largest. {against}"
    )


_MAKERS = (
    gpu_machine,
    gpu_decode,
    gpu_memory,
    gpu_forms,
    gpu_rival,
    gpu_switch,
    gpu_graphs,
    gpu_today,
    gpu_products,
    gpu_groups,
    gpu_attention,
    gpu_linear,
    gpu_linear_facts,
)
GPU_TABLES = {maker.__name__: maker for maker in _MAKERS}
