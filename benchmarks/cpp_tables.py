"""Tables of docs/evidence/engines.md: the C++ library and the service."""

from collections.abc import Callable
from typing import Any

from markdown_tables import grid, load

__all__ = ["CPP_TABLES"]


def cpp_equal() -> str:
    """How equal the C++ library's results are to Python's."""
    lines = [
        [
            row["bundle"],
            "equal" if row["tokens_equal"] and row["text_equals_coatrt_run"] else "**differ**",
            f"{row['logits_difference']:.1e}",
            f"{row['lora_equal']} of {row['lora_tensors']}",
            f"{row['under_load']['wrong']} wrong of {row['under_load']['generations']}",
        ]
        for row in load("cpp_runtime")["rows"]
    ]
    head = [
        "bundle",
        "tokens, text",
        "logits differ by",
        "LoRA tensors equal bit for bit",
        "LoRA changed before every generation, 4 threads",
    ]
    return grid(head, lines)


def cpp_runtime() -> str:
    """The C++ library's times against Python's."""
    lines = []
    for row in load("cpp_runtime")["rows"]:
        speed = row["decode"]
        lines.append(
            [
                row["bundle"],
                f"{speed['cpp_ms']:.1f} / {speed['python_ms']:.1f}",
                f"{speed['ratio']:.3f} ({speed['ratio_quartiles'][0]:.3f} – {speed['ratio_quartiles'][1]:.3f})",
                f"{row['emit_ms']:.0f} + {row['bind_ms']:.2f}",
                f"{row['under_load']['swap_p50_ms']:.0f}",
            ]
        )
    head = [
        "bundle",
        "decode ms/token C++ / Python",
        "ratio (quartiles)",
        "emit + bind ms",
        "the same with 4 threads, p50 ms",
    ]
    return grid(head, lines)


def cpp_service() -> str:
    """The service under load, and what decoding together is worth."""
    found = load("cpp_service")
    request, first, memory, streams = found["request"], found["first_token"], found["rss_mb"], found["streams"]
    speeds = ", ".join(f"{count}: {speed:.0f}" for count, speed in streams["tokens_per_s"].items())
    return (
        f"{found['clients']} clients for {found['seconds']:.0f} s on {found['sessions']} sessions: "
        f"{found['requests']} requests, {len(found['errors'])} errors, {found['wrong']} with another token or log "
        f"probability than alone; p50 {request['p50_ms']:.0f} ms, p99 {request['p99_ms']:.0f} ms for "
        f"{found['tokens_per_request']} tokens, to the first token p50 {first['p50_ms']:.0f} ms, "
        f"p99 {first['p99_ms']:.0f} ms; {found['tokens_per_s']:.0f} tokens/s; resident memory "
        f"{memory['after_a_quarter']:.0f} MB after a quarter of the time, {memory['at_the_end']:.0f} MB at the end.\n\n"
        f"Decoded tokens/s by the number of streams: {speeds}; {streams['ratio']:.1f} × as many with "
        f"{found['sessions']} as with one."
    )


_GROUPS = ("strings", "Unicode", "with NUL")
_LIBRARIES = ("coatrt", "extensions", "genai")


def _differ(row: dict[str, Any]) -> str:
    """Return how many texts have other ids than in Hugging Face's library."""
    if "others" in row:
        return str(row["others"]).split(":")[0]
    counts = [row[group] for group in _GROUPS]
    return f"{sum(c['ids_differ'] for c in counts):,} of {sum(c['texts'] for c in counts):,}"


def cpp_tokenizers() -> str:
    """Three tokenizers with C interfaces against Hugging Face's."""
    found = load("cpp_tokenizers")
    rows = []
    for name, speed in found["speed"].items():
        per_s = [f"{speed['mb_per_s'][kind]:.1f}" if kind in speed["mb_per_s"] else "" for kind in _LIBRARIES]
        rows.append([name, *(_differ(found["tokenizers"][name][kind]) for kind in _LIBRARIES), *per_s])
    head = ["tokenizer", *(f"other ids: {kind}" for kind in _LIBRARIES), *(f"MB/s: {kind}" for kind in _LIBRARIES)]
    hostile = []
    for kind in _LIBRARIES:
        counts = {state: count for state, count in found["hostile"][kind].items() if state != "cases"}
        hostile.append(f"{kind} " + ", ".join(f"{count} {state}" for state, count in sorted(counts.items())))
    packages = " and ".join(f"{name.replace('_', '-')} {version}" for name, version in found["packages"].items())
    return (
        f"{grid(head, rows)}\n\n{packages}, {found['mb']['extensions']:.1f} and {found['mb']['genai']:.1f} MB; "
        f"coatrt's tokenizer adds {found['mb']['coatrt']:.2f} MB. Damaged or hostile tokenizer.json: "
        f"{'; '.join(hostile)}."
    )


_MAKERS = (cpp_equal, cpp_runtime, cpp_service, cpp_tokenizers)
CPP_TABLES: dict[str, Callable[[], str]] = {maker.__name__: maker for maker in _MAKERS}
