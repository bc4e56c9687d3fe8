"""The table of docs/guides/onnxruntime-genai.md."""

from markdown_tables import grid, load

__all__ = ["GENAI_TABLES"]


def genai() -> str:
    """Real bundles in onnxruntime-genai, beside coatrt's own decoder and torch."""
    found = load("genai")
    rows = []
    for name, texts in found["texts"].items():
        score = found.get("lm_eval", {}).get(name)
        rows.append(
            [
                name,
                *(f"{texts[kind]['equal_texts']} of {texts['prompts']}" for kind in ("lora", "no_lora")),
                f"{max(texts[kind]['largest_difference'] for kind in ('lora', 'no_lora')):.1e}",
                f"{score['loss']:.4f}" if score else "",
                f"{score['verify']:.4f}" if score else "",
            ]
        )
    head = ["bundle", "equal texts", "without LoRA", "largest Δlogit", "loss in lm-eval", "loss in torch"]
    texts = next(iter(found["texts"].values()))
    note = (
        f"SmolLM2-135M on the CPU, onnxruntime-genai {found['onnxruntime_genai']}: {texts['prompts']} prompts, "
        f"{texts['tokens']} tokens each, compared with `coatrt run`. Its tokenizer gave coatrt's ids for "
        f"{texts['equal_prompts']} of {texts['prompts']} prompts."
    )
    if "lm_eval" in found:
        score = next(iter(found["lm_eval"].values()))
        note += (
            f" Losses per token over {score['tokens']:,} tokens, by lm-eval {score['lm_eval']} from the export for "
            "evaluation, and by `coatrt verify --data` with the bundle's weights in torch."
        )
    if "optional_inputs" in found:
        inputs = found["optional_inputs"]
        more = inputs["zeros"]["unshared_bytes"] - inputs["required"]["unshared_bytes"]
        zeros, own = (inputs[kind]["file_bytes"] / 1e6 for kind in ("zeros", "LoRA"))
        note += (
            f" LoRA inputs with default values cost {more / 1e6:.1f} MB of memory, and {zeros:.2f} MB on disk for "
            f"zeros, {own:.1f} MB for the LoRA itself."
        )
    return f"{grid(head, rows)}\n\n{note} `{found['command']}`"


GENAI_TABLES = {"genai": genai}
