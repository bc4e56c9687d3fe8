"""The tables of docs/evidence/planning.md and of the CPU in docs/evidence/engines.md, see `tables.py`."""

import math

from markdown_tables import grid, load

__all__ = ["FLEET_TABLES"]


def fleet() -> str:
    """Times of planning and building a fleet."""
    found = load("fleet")
    plans, built = found["planning"], found["building"]
    least, most = (f(row["memory_bytes"] for row in plans["devices"]) / 2**30 for f in (min, max))
    return (
        f"`python benchmarks/fleet.py` (two busy cores): `coatrt plan` for {len(plans['devices'])} devices of "
        f"{least:.0f} to {most:.0f} GiB takes {plans['command_median_s']:.1f} s, process start included (median of "
        f"{len(plans['command_s'])}). Bundles for three devices, engines included: {built['one_at_a_time_s']:.0f} s "
        f"with one builder at a time, {built['side_by_side_s']:.0f} s with two side by side. `coatrt build` again, "
        f"nothing to do: {built['second_build_median_s']:.1f} s, process start included."
    )


def fleet_engines() -> str:
    """Engine bytes against their prediction."""
    rows = load("fleet")["engines"]
    lines = [
        [
            row["device"],
            f"{row['bits']:.2f}",
            f"{row['engine_bytes'] / 1e6:.1f}",
            f"{row['predicted_bytes'] / 1e6:.1f}",
            f"{row['error']:+.2%}",
        ]
        for row in rows
    ]
    worst = max(abs(row["error"]) for row in rows)
    return grid(["GPU", "bits per weight", "engine MB", "predicted MB", "error"], lines) + f"\n\n{worst:.2%} at worst."


def fleet_memory() -> str:
    """Memory of ONNX Runtime against its prediction."""
    lines = [
        [
            row["bundle"],
            f"{row['predicted_bytes'] / 2**20:.0f}",
            f"{row['resident_bytes'] / 2**20:.0f}",
            f"{row['peak_bytes'] / 2**20:.0f}",
        ]
        for row in load("fleet")["cpu_memory"]
    ]
    head = ["configuration on the CPU", "predicted MiB", "resident MiB", "peak MiB"]
    return (
        grid(head, lines)
        + "\n\nA process with ONNX Runtime at accuracy level 4, after a prompt of 512 tokens and one decoded token. "
        "The peak falls into loading, where formats other than int8 and int4 are decoded."
    )


def switching() -> str:
    """Times of switching."""
    rows = load("fleet")["switching"]
    lines = []
    for held in sorted({row["held"] for row in rows}):
        part = [row for row in rows if row["held"] == held]
        part = part[len(part) // 2 :]  # the first round loads whatever is held
        middle = [sorted(row[key] for row in part)[len(part) // 2] * 1e3 for key in ("load_s", "emit_s", "bind_s")]
        lines.append([str(held), *(f"{value:.0f}" for value in middle)])
    head = ["decoders held", "load ms", "emit LoRA ms", "bind LoRA, move caches ms"]
    return grid(head, lines) + "\n\nMedians over three bundles of SmolLM2-135M in ONNX Runtime (`benchmarks/fleet.py`)."


def cpu_timings() -> str:
    """Predicted decode against the real one."""
    found = load("cpu_timings")
    lines = [
        [
            f"{row['bits']:.2f}",
            f"{row['real_ms']:.2f}",
            f"{row['predicted_ms']:.2f}",
            f"{row['error']:+.1%}",
            f"{row['drift']:.2f}",
            f"{row['error_without_drift']:+.1%}",
        ]
        for row in found["rows"]
    ]
    head = ["bits per weight", "real ms", "predicted ms", "error", "drift", "error, drift out"]
    worst, corrected = found["worst_error"], found["worst_error_without_drift"]
    return (
        grid(head, lines)
        + f"\n\n{len(found['rows'])} of 10 configurations; one thread, accuracy level {found['accuracy_level']}, "
        f"LoRA on, {found['context']} slots, in seconds of the thread. At worst {worst:.1%}, and {corrected:.1%} "
        "with the machine's drift taken out (a reference decoder timed beside each configuration, now over then)."
    )


def cpu_decode() -> str:
    """Decode on the CPU against llama.cpp."""
    found = load("cpu_decode")
    lines = [
        [
            row["what"],
            *(
                f"{row[key]:.{digits}f}"
                for key, digits in (("decode_ms", 1), ("decode_tokens_per_s", 0), ("prefill_tokens_per_s", 0))
            ),
        ]
        for row in found["rows"]
    ]
    overhead = found["lora_overhead"]
    rival = "Not compared with llama.cpp yet."
    if "decode_speedup" in found:
        plain, adapted, prefill = (found[key] for key in ("decode_speedup", "decode_speedup_lora", "prefill_speedup"))
        rival = (
            f"Against llama.cpp ({found['bits']['llama.cpp']:.2f} bits in its file): decode {plain:.2f} ×, with LoRA "
            f"{adapted:.2f} ×, prefill {prefill:.2f} ×; its LoRA costs {100 * overhead['llama.cpp']:+.0f} %."
        )
    losses = ", ".join(
        f"{label.split(', ')[1]}: {loss:.3f} (perplexity {math.exp(loss):.1f})"
        for label, loss in found["held_out_loss"].items()
    )
    return (
        grid(["", "decode ms", "decode tokens/s", "prefill tokens/s"], lines)
        + f"\n\n{found['threads']} thread(s), {found['clock']} clock, alternating; {found['bits']['coatrt']:.2f} bits "
        f"per weight. {rival} LoRA overhead at decode {100 * overhead['coatrt']:+.0f} %. Held-out loss with the LoRA, "
        f"{losses}."
    )


def cpu_lora() -> str:
    """The LoRA's products on the CPU by the type of its tensors."""
    found = load("cpu_lora")
    times = ", ".join(f"{kind} {ms:.1f} ms" for kind, ms in found["ms"].items())
    return f"The {found['products']} products of the LoRA in a decode step of SmolLM2-135M, one thread: {times}."


_MAKERS = (fleet, fleet_engines, fleet_memory, switching, cpu_timings, cpu_decode, cpu_lora)
FLEET_TABLES = {maker.__name__: maker for maker in _MAKERS}
