"""What is on disk and in a session: shared weights, alignment, fusion, folding, memory."""

import hashlib
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch

from coatrt.configs.config import ConfigPatterns, QuantConfig
from coatrt.configs.lora_contract import contract_for
from coatrt.export.decoder import WEIGHTS_FILE, GraphForm, export_decoder
from coatrt.export.weight_file import WeightFile
from coatrt.models.checkpoint import Checkpoint
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.weight_format import WeightFormat
from support.families import CPU, ENGINE, export, save_model

MIXED = ConfigPatterns(
    patterns=(
        ("*layers.0.*", WeightFormat.parse("nf3-g16-dq4-bf16-64")),
        ("*layers.1.mlp.*", WeightFormat.parse("fp8")),
        ("*layers.1.*", WeightFormat.parse("nvfp4")),
    ),
    default=WeightFormat.parse("int4-g32"),
)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("tied")
    save_model(directory, "llama-tied-biases")
    return Checkpoint.open(directory)


def external(path: Path) -> dict[str, tuple[int, int]]:
    """Return name → (offset, length) of the initializers outside a graph file."""
    places = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            assert entries["location"] == WEIGHTS_FILE
            places[tensor.name] = (int(entries["offset"]), int(entries["length"]))
        else:
            assert len(tensor.raw_data) <= 1024
    return places


def test_weight_file_stores_equal_bytes_once_and_aligned(tmp_path: Path) -> None:
    large = torch.arange(1 << 18, dtype=torch.int32)
    with WeightFile(tmp_path) as weights:
        first = weights.add(torch.tensor([1, 2, 3], dtype=torch.uint8))
        page = weights.add(large)
        second = weights.add(torch.tensor([4.0]))
        again = weights.add(large.view(torch.float32))
        assert weights.add(torch.tensor([1, 2, 3], dtype=torch.int8)) == first
    assert (first, page, second, again) == ((0, 3), (4096, 1 << 20), (4096 + (1 << 20), 4), page)
    data = (tmp_path / WEIGHTS_FILE).read_bytes()
    assert data[:3] == b"\1\2\3"
    assert data[4096 : 4096 + (1 << 20)] == large.numpy().tobytes()
    assert len(data) == weights.size == 4096 + (1 << 20) + 4


@pytest.mark.parametrize("activations", ["float32", "float16"])
def test_forms_share_one_file_without_duplicates(tmp_path: Path, tied: Checkpoint, activations: str) -> None:
    engine = GraphForm("engine", "base.onnx", activations, 48)
    export_decoder(tied, MIXED.resolve(tied.matrices), tmp_path, forms=[engine, CPU])
    both = [external(tmp_path / form.file) for form in (engine, CPU)]
    data = (tmp_path / WEIGHTS_FILE).read_bytes()
    places = {place for names in both for place in names.values()}
    hashes = {hashlib.sha256(data[offset : offset + length]).digest() for offset, length in places}
    assert len(hashes) == len(places)
    end = 0
    for offset, length in sorted(places):  # no gap but alignment, no overlap
        assert offset % 64 == 0
        assert 0 <= offset - end < 64
        end = offset + length
    assert end == len(data)
    shared = set(both[0].values()) & set(both[1].values())
    stored = sum(length for _, length in shared)
    config = MIXED.resolve(tied.matrices)
    whole = [m for m in tied.matrices.matrices if config[m.name].effective(m.K).padded(m.K) == m.K]
    assert len(whole) > len(tied.matrices.matrices) / 2
    # Codes and scales serve both forms, save those of matrices with a short last block: one form keeps its padding.
    assert stored >= sum(config[m.name].nbytes(m.N, m.K) for m in whole)


def test_tied_table_is_stored_once_in_the_engine_form(tmp_path: Path, tied: Checkpoint) -> None:
    for fmt, bits in (("int4-g32", 4.5), ("int8", 8 + 16 / 48), ("fp8", 8 + 16 / 48), ("nf4-g16", 5.0), ("fp16", 16)):
        directory = export(tied, tmp_path / fmt, (ENGINE,), fmt)
        places = external(directory / ENGINE.file)
        table = {place for name, place in places.items() if "embed_tokens" in name or "lm_head" in name}
        padded = 64 / 48 if fmt == "int4-g32" else 1  # the scales of the last, short block
        assert sum(length for _, length in table) <= 96 * 48 * bits / 8 * padded


def test_every_node_and_value_has_a_name_of_its_own(tmp_path: Path, tied: Checkpoint) -> None:
    contract = contract_for(tied.matrices, 16, 16)
    export_decoder(tied, MIXED.resolve(tied.matrices), tmp_path, forms=[ENGINE, CPU], contract=contract)
    for form in (ENGINE, CPU):
        model = onnx.load(tmp_path / form.file, load_external_data=False)
        names = [node.name for node in model.graph.node]
        assert all(names)
        assert len(set(names)) == len(names)
        assert [node.output[0] for node in model.graph.node] == names
        opsets = [("", 24)] if form is ENGINE else [("", 24), ("com.microsoft", 1)]
        assert (model.ir_version, [(opset.domain, opset.version) for opset in model.opset_import]) == (11, opsets)
        onnx.checker.check_model(str(tmp_path / form.file), full_check=False)


def optimized(directory: Path, form: GraphForm) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.optimized_model_filepath = str(directory / "optimized.onnx")
    ort.InferenceSession(str(directory / form.file), options, providers=["CPUExecutionProvider"])
    return onnx.load(directory / "optimized.onnx").graph


@pytest.mark.parametrize("activations", ["float32", "float16"])
@pytest.mark.parametrize("fmt", ["int4-g32", "int4-g64", "int8", "int8-g32", "int8-g64", "int8-g128"])
@pytest.mark.parametrize("name", ["llama", "llama-tied-biases"])
def test_integer_matrices_fuse_into_matmul_nbits(tmp_path: Path, name: str, fmt: str, activations: str) -> None:
    save_model(tmp_path / "model", name)
    form = GraphForm("cpu", "cpu.onnx", activations)
    graph = optimized(export(Checkpoint.open(tmp_path / "model"), tmp_path / "out", (form,), fmt), form)
    ops = Counter(node.op_type for node in graph.node)
    assert (ops["MatMulNBits"], ops["MatMul"], ops["DequantizeLinear"]) == (
        3 * 4 + 1,
        0,
        0,
    )  # q|k|v and gate|up are one each


@pytest.mark.parametrize("fmt", ["fp16", "bf16", "fp8", "nvfp4", "nf2-g16", "nf3-g16", "nf8-g16-dq3-fp32-16"])
def test_other_formats_fold_to_plain_weights(tmp_path: Path, tied: Checkpoint, fmt: str) -> None:
    for activations in ("float32", "float16"):
        form = GraphForm("cpu", "cpu.onnx", activations)
        graph = optimized(export(tied, tmp_path / activations, (form,), fmt), form)
        weights = {tensor.name for tensor in graph.initializer}
        # In float16 ONNX Runtime computes in float32 and casts the folded weight first.
        weights |= {node.output[0] for node in graph.node if node.op_type == "Cast" and node.input[0] in weights}
        products = [node for node in graph.node if node.op_type in ("MatMul", "FusedMatMul")]
        separate = 3 if "dq" in fmt else 0  # doubly quantized scales run through all rows of a matrix
        assert len(products) == 3 * (4 + separate) + 1
        assert all(node.input[1] in weights for node in products)


def test_codes_come_from_the_store_and_progress_is_told(tmp_path: Path, tied: Checkpoint) -> None:
    config = QuantConfig.uniform(tied.matrices, "nf4-g16")
    seen: list[tuple[object, ...]] = []
    for part, codes in (("direct", None), ("stored", CodeStore(tied))):
        (tmp_path / part).mkdir()
        export_decoder(
            tied, config, tmp_path / part, forms=[CPU], codes=codes, progress=lambda *state: seen.append(state)
        )
    assert seen == 2 * [(done, 22, "matrices", name) for done, name in enumerate(tied.matrices.names, 1)]
    for file in ("cpu.onnx", WEIGHTS_FILE):
        assert (tmp_path / "direct" / file).read_bytes() == (tmp_path / "stored" / file).read_bytes()


_MEASURE = """
import sys
from pathlib import Path
import torch
import coatrt.export.decoder as decoder
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.modules import empty_model
from coatrt.configs.config import QuantConfig
torch.set_num_threads(1)
decoder.encode(torch.ones(64, 64), "nf4-g64")  # imports and thread pools
decoder.DecoderSpec.from_config((checkpoint := Checkpoint.open(sys.argv[1])).config)
empty_model(checkpoint)  # imports transformers' modules
def peak():  # not getrusage: it counts what the parent held before exec
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10
start = peak()
forms = [decoder.GraphForm("engine", "base.onnx", "float16", 64), decoder.GraphForm("cpu", "cpu.onnx", "float32")]
config = QuantConfig.uniform(checkpoint.matrices, sys.argv[3])
decoder.export_decoder(checkpoint, config, Path(sys.argv[2]), forms=forms)
print(peak() - start)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    import json

    from safetensors.torch import save_file

    save_model(tmp_path / "model", "llama")
    H, inner, V, layers = 512, 2048, 4096, 16
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"hidden_size": H, "intermediate_size": inner, "num_hidden_layers": layers}
    config |= {"vocab_size": V, "head_dim": 128, "num_attention_heads": 4}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    tensors = {"model.norm.weight": torch.ones(H, dtype=torch.float16)}
    shapes = {"model.embed_tokens": (V, H), "lm_head": (V, H)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{norm}.weight"] = torch.ones(H, dtype=torch.float16)
        shapes |= {f"{at}.self_attn.{part}_proj": (N, H) for part, N in (("q", H), ("k", 256), ("v", 256), ("o", H))}
        shapes |= {f"{at}.mlp.{part}_proj": (inner, H) for part in ("gate", "up")} | {f"{at}.mlp.down_proj": (H, inner)}
    tensors |= {f"{name}.weight": torch.randn(shape).half() for name, shape in shapes.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", _MEASURE, str(tmp_path / "model"), str(tmp_path / "out"), "int8"]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert size > 130e6
    assert grown < size / 2
