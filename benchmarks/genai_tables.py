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
        f"{texts['tokens']} tokens each, compared with `coatrt run`."
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
        note += (
            f" Default values cost {more / 1e6:.1f} MB of memory, and {inputs['zeros']['file_bytes'] / 1e6:.2f} MB on "
            f"disk for zeros, {inputs['LoRA']['file_bytes'] / 1e6:.1f} MB for the LoRA itself."
        )
    return f"{grid(head, rows)}\n\n{note} `{found['command']}`"


GENAI_TABLES = {"genai": genai}
