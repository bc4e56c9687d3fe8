"""One input of every kind that coatrt reads, tiny and whole, for a campaign to mutate."""

import contextlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

from support.quantized import write_methods
from support.seals import seal_text
from support.tiny import TEXTS, save_tiny_llama, text_data, tiny_options

__all__ = ["METHODS", "SEALED", "make_inputs", "reseal", "seal_again"]

METHODS = ("gptq", "awq", "compressed-tensors", "modelopt")
"""Folders of quantized checkpoints, see `write_methods`."""
SEALED = ("adapter.json", "archive.json", "cpu.json", "manifest.json", "run.json", "sensitivity.json")

_TOOLS = [{"type": "function", "function": {"name": "sum", "parameters": {"type": "object"}}}]
_CALL = {"id": "c1", "type": "function", "function": {"name": "sum", "arguments": '{"a": 2}'}}
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def _run(*arguments: Any) -> None:
    from coatrt.cli.main import cli

    with contextlib.redirect_stdout(io.StringIO()):
        cli.main([str(argument) for argument in arguments], standalone_mode=False)


def make_inputs(here: Path) -> None:
    """Write model, adapter with archive and training state, bundle, plan, configuration, LoRA, data and GGUF."""
    from coatrt.searching.run import search
    from coatrt.training.resume_state import claim_state
    from coatrt.training.run import train

    model = save_tiny_llama(here / "model")
    (model / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    (model / "generation_config.json").write_text('{"eos_token_id": [256, 0], "temperature": 0.6}')
    adapter = here / "adapter"
    train(model, text_data(model), adapter, tiny_options(steps=2, formats=("int4-g32", "int8"), learn_scales=1))
    search(adapter, text_data(model), evaluations=3, blocks=1)
    claim_state(here / "state", "run")
    _run("build", adapter, "--target", "rtx-4090", "-o", here / "bundle", "--no-engine", "--context", 64)
    _run("plan", adapter, "--target", "t4", "--keep", "lm_head=int8", "-o", here / "plan.json")
    (here / "configuration.json").write_text(
        '{"default": "int8", "patterns": {"*down_proj": "int4-g32"}, "matrices": {}}'
    )
    (here / "lora.safetensors").write_bytes((here / "bundle" / "lora.safetensors").read_bytes())
    (here / "data.txt").write_text("\n".join(TEXTS))
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes", "weight": 0}]
    talk += [{"role": "user", "content": "so"}, {"role": "assistant", "content": "no", "weight": 1}]
    called = [talk[0], {"role": "assistant", "content": None, "tool_calls": [_CALL]}]
    called += [{"role": "tool", "tool_call_id": "c1", "content": "3"}, talk[3]]
    chat = [{"messages": talk}, {"messages": called, "tools": _TOOLS}, {"prompt": "a", "completion": "b"}]
    (here / "chat.jsonl").write_text("\n".join(map(json.dumps, chat)))
    choice = [{"prompt": "a", "choices": [" b", " c"], "answer": i % 2} for i in range(4)]
    (here / "choice.jsonl").write_text("\n".join(map(json.dumps, choice)))
    _timings(here, adapter)
    _gguf(here)
    write_methods(here)


def _timings(here: Path, adapter: Path) -> None:
    from coatrt.adapter.description import AdapterDescription
    from coatrt.planning.measured_latency import MeasuredLatency, Product, Rest
    from coatrt.system.json_data import write_json

    facts = AdapterDescription.load(adapter)
    products = {
        (m.K, m.N, str(fmt.effective(m.K)), tokens)
        for m in facts.model.multiplied
        for fmt in facts.formats
        for tokens in (1, 16)
    }
    spec, lora = facts.spec, facts.lora_parameters
    shape = (spec.layers, spec.hidden, 160, spec.heads, spec.kv_heads, spec.head_dim, lora)
    rests = tuple(Rest(shape, tokens, 64, 1e-3) for tokens in (1, 16))
    made = MeasuredLatency("cpu", "ort", {}, tuple(Product(*p, 1e-4) for p in sorted(products)), rests)
    write_json(here / "cpu.json", made)


def _gguf(here: Path) -> None:
    import numpy as np

    try:
        import gguf
    except ImportError:
        return
    writer = gguf.GGUFWriter(str(here / "model.gguf"), "llama")
    for name, value in (
        ("context_length", 64),
        ("embedding_length", 32),
        ("block_count", 1),
        ("feed_forward_length", 64),
    ):
        getattr(writer, f"add_{name}")(value)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([chr(33 + i) for i in range(64)])
    writer.add_token_types([1] * 64)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    shapes = {"token_embd": (64, 32), "output_norm": (32,), "output": (64, 32)}
    block = {"attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32)}
    block |= {"attn_output": (32, 32), "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    for name, shape in [*shapes.items(), *((f"blk.0.{name}", shape) for name, shape in block.items())]:
        writer.add_tensor(f"{name}.weight", np.full(shape, 0.1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def seal_again(path: Path) -> None:
    """Give a changed file a seal that holds, whatever it has become."""
    text = path.read_bytes().decode("utf-8", "surrogateescape")
    rest = re.sub(r'^\{\s*"seal":\s*"[0-9a-f]*",\s*', "{", text, count=1)
    text = seal_text(rest) if rest.startswith("{") else text
    path.write_bytes(text.encode("utf-8", "surrogateescape"))


def reseal(directory: Path, name: str) -> None:
    """Make the hashes of an adapter or a bundle those of a file that was changed, as whoever made both could."""
    from coatrt.system.files import sha256_file

    side = directory / ("adapter.json" if (directory / "adapter.json").is_file() else "manifest.json")
    if name in SEALED:
        seal_again(directory / name)
    if side.name == name:
        return
    facts = json.loads(side.read_text())
    facts.pop("seal")
    found = sha256_file(directory / name)
    if "sha256" in facts and name in facts["sha256"]:
        facts["sha256"][name] = found
    elif name in facts.get("files", {}):
        facts["files"][name] = {"sha256": found, "bytes": (directory / name).stat().st_size}
    side.write_text(seal_text(json.dumps(facts)))


if __name__ == "__main__":
    make_inputs(Path(sys.argv[1]))
