"""compressed-tensors checkpoints, compressed and loaded by its own package."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from coatrt.errors import CheckpointError
from coatrt.models.checkpoint import Checkpoint
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.codec import decode
from support.quantized import Tensors, base_model, integers, write_quantized

pytest.importorskip("compressed_tensors", reason="needs compressed-tensors (pip install compressed-tensors)")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_model(tmp_path_factory.mktemp("base") / "model", initializer_range=0.2)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COATRT_CACHE", str(tmp_path / "cache"))


def write(base: Path, directory: Path, groups: dict[str, Any], ignore: tuple[str, ...] = ("lm_head",)) -> Path:
    """Compress a model with the package: schemes of its own classes, scales and zero points by range."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

    config = QuantizationConfig(
        config_groups=groups,
        ignore=list(ignore),
        format="mixed-precision" if len(groups) > 1 else next(iter(groups.values()))["format"],
        quantization_status="compressed",
    )

    def pack(module: str, weight: torch.Tensor) -> Tensors | None:
        schemes = [
            scheme
            for scheme in config.config_groups.values()
            if any(match_name(module, target) or target == "Linear" for target in scheme.targets)
        ]
        if any(match_name(module, name) for name in ignore) or not schemes:
            return None
        scheme, state = schemes[0], {"weight": weight.bfloat16()}
        arguments, (N, K) = scheme.weights, weight.shape
        if arguments.strategy == "tensor_group":
            top = 448 * 6 / weight.abs().max()
            local = (weight.view(N, -1, 16).abs().amax(-1) / 6 * top).clamp(max=448).to(torch.float8_e4m3fn)
            state |= {"weight_scale": local.float(), "weight_global_scale": top.reshape(1).float()}
        elif arguments.type == "float":
            rows = weight if arguments.strategy == "channel" else weight.reshape(1, -1)
            state["weight_scale"] = (rows.abs().amax(1, keepdim=True) / 448).bfloat16()
        else:
            group = arguments.group_size if arguments.strategy == "group" else K
            made = integers(weight, arguments.num_bits, group, arguments.symmetric, torch.bfloat16)
            state["weight_scale"] = made["scale"]
            if not arguments.symmetric:
                state["weight_zero_point"] = (made["zero"] - (1 << (arguments.num_bits - 1))).to(torch.int8)
        return BaseCompressor.get_value_from_registry(scheme.format).compress(state, scheme)

    settings = {**json.loads(config.model_dump_json()), "version": "0.20.0"}
    settings |= {"sparsity_config": {}, "transform_config": {}}
    return write_quantized(base, directory, settings, pack)


def scheme(storage: str, targets: tuple[str, ...] = ("Linear",), **arguments: Any) -> dict[str, Any]:
    return {"targets": list(targets), "weights": arguments, "format": storage}


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
SCHEMES = {
    "int4-g128": (scheme("pack-quantized", **INT4), "int4-g128"),
    "int4-g32, asymmetric": (scheme("pack-quantized", **{**INT4, "group_size": 32, "symmetric": False}), "int8-g32"),
    "int4, channel": (
        scheme("pack-quantized", num_bits=4, type="int", strategy="channel", symmetric=True),
        "int4-g128",  # with the scale of a row in each block
    ),
    "int8-g64": (scheme("pack-quantized", **{**INT4, "num_bits": 8, "group_size": 64}), "int8-g64"),
    "int8, channel": (scheme("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True), "int8"),
    "int8, asymmetric": (
        scheme("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False),
        "bf16",
    ),
    "fp8, channel": (scheme("float-quantized", **FP8), "fp8"),
    "fp8, tensor": (scheme("float-quantized", **{**FP8, "strategy": "tensor"}), "fp8"),
    "nvfp4": (scheme("nvfp4-pack-quantized", **NVFP4), "nvfp4"),
    "2 bits": (scheme("pack-quantized", **{**INT4, "num_bits": 2}), "int4-g128"),
    "3 bits": (scheme("pack-quantized", **{**INT4, "num_bits": 3}), "int4-g128"),
}


def loaded(directory: Path) -> dict[str, torch.Tensor]:
    """Return the weights as transformers loads and compressed-tensors decompresses them."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    model = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=CompressedTensorsConfig(run_compressed=False, dequantize=True)
    )
    model(torch.tensor([[1, 2]]))
    return {name: value for name, value in model.state_dict().items() if name.endswith("weight")}


@pytest.mark.parametrize("kind", SCHEMES)
def test_weights_are_those_of_the_loader_and_codes_are_kept(base: Path, tmp_path: Path, kind: str) -> None:
    group, held = SCHEMES[kind]
    directory = write(base, tmp_path / "q", {"group_0": group})
    checkpoint, expected = Checkpoint.open(directory), loaded(directory)
    stored = load_file(directory / "model.safetensors")
    store = CodeStore(checkpoint)
    assert checkpoint.codes is not None
    kept = 0
    for name in checkpoint.matrices.names:
        assert torch.equal(checkpoint.tensor(f"{name}.weight"), expected[f"{name}.weight"].bfloat16()), name
        if name in checkpoint.codes.formats:
            assert checkpoint.formats[name] == held
            matrix = store.get(name, held)
            if held == "nvfp4":  # its loader divides by what is multiplied here: another last bit of float32
                assert torch.equal(matrix.scales.float(), stored[f"{name}.weight_scale"].float())  # type: ignore[union-attr]
                assert matrix.constant == 1 / float(stored[f"{name}.weight_global_scale"])
                assert torch.allclose(decode(matrix), expected[f"{name}.weight"], rtol=2**-8, atol=0), name
            else:
                assert torch.equal(decode(matrix).bfloat16(), expected[f"{name}.weight"].bfloat16()), name
            kept += 1
    assert kept == 0 if held == "bf16" else kept > 7 if held == "nvfp4" else kept == 14


def test_a_map_per_layer(base: Path, tmp_path: Path) -> None:
    groups = {
        "group_0": scheme("pack-quantized", ("re:.*(q|k|v|o)_proj",), **INT4),
        "group_1": scheme("float-quantized", ("re:.*up_proj", "re:.*gate_proj"), **FP8),
        "group_2": scheme("pack-quantized", ("model.layers.1.mlp.down_proj",), **{**INT4, "num_bits": 8}),
    }
    checkpoint = Checkpoint.open(write(base, tmp_path / "q", groups))
    formats = checkpoint.formats
    assert formats["model.layers.0.self_attn.o_proj"] == "int4-g128"
    assert formats["model.layers.1.mlp.gate_proj"] == "fp8"
    assert formats["model.layers.1.mlp.down_proj"] == "int8-g128"
    assert formats["model.layers.0.mlp.down_proj"] == formats["model.embed_tokens"] == "bf16"


def edit(directory: Path, change: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def _weights(**changes: Any) -> Any:
    return lambda q: q["config_groups"]["group_0"]["weights"].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(version="0.21.0"), "version '0.21.0'; coatrt reads up to 0.20"),
        (lambda q: q.update(version="1.0"), "version '1.0'"),
        (lambda q: q.update(rotation={"r": 1}), "key 'rotation', which coatrt does not know"),
        (lambda q: q.update(format="marlin-24") or q["config_groups"]["group_0"].pop("format"), "format 'marlin-24'"),
        (lambda q: q.update(transform_config={"config_groups": {"a": {}}}), "transform_config, which changes"),
        (lambda q: q.update(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config, which changes"),
        (lambda q: q.update(quantization_status="initialized"), "status 'initialized'"),
        (lambda q: q.update(ignore=["lm_head", "re:.*up_proj"]), "up_proj is not quantized, the files hold it quan"),
        (lambda q: q.update(ignore=[]), "lm_head is quantized, the files hold it plain"),
        (lambda q: q.update(ignore=["re:(a+)+b"]), "no repeated group"),
        (lambda q: q.update(config_groups={}), "no config_groups"),
        (_weights(num_bits=5), "asks for 5 bits of int"),
        (_weights(group_size=64), r"in groups of 64 and has scales \[128, 2\]"),
        (_weights(type="float"), "asks for 4 bits of float"),
        (_weights(dynamic=True), "asks for 4 bits"),
        (_weights(symmetric=False), "has no tensor .*weight_zero_point"),
        (_weights(wings=2), "key 'wings'"),
        (lambda q: q["config_groups"]["group_0"].update(targets="Linear"), "targets is not a list"),
    ],
)
def test_other_settings_are_refused_by_name(base: Path, tmp_path: Path, change: Any, message: str) -> None:
    directory = write(base, tmp_path / "q", {"group_0": SCHEMES["int4-g128"][0]})
    edit(directory, change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(directory)


def test_quantized_activations_and_cache_are_named(base: Path, tmp_path: Path) -> None:
    directory = write(base, tmp_path / "q", {"group_0": SCHEMES["fp8, channel"][0]})
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.input_scale"] = torch.tensor(0.5)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    activations = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
    edit(directory, lambda q: q["config_groups"]["group_0"].update(input_activations=activations))
    edit(directory, lambda q: q.update(kv_cache_scheme={"num_bits": 8, "type": "float"}))
    checkpoint = Checkpoint.open(directory)
    assert checkpoint.codes is not None
    assert "its KV cache is not quantized here; its activations are not quantized here" in checkpoint.codes.line


def test_groups_that_g_idx_permutes_are_decoded(base: Path, tmp_path: Path) -> None:
    """Older versions of the package wrote them; its loader gathers the columns of a group by weight_g_idx."""
    directory = write(base, tmp_path / "q", {"group_0": SCHEMES["int4-g128"][0]})
    name = "model.layers.1.mlp.down_proj"
    tensors = load_file(directory / "model.safetensors")
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0)) // 128
    tensors[f"{name}.weight_g_idx"] = order.int()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(directory)
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    codes = unpack_from_int32(tensors[f"{name}.weight_packed"], 4, torch.Size([128, 256]))
    expected = codes.float() * tensors[f"{name}.weight_scale"].float()[:, order]
    assert torch.equal(checkpoint.tensor(f"{name}.weight"), expected.bfloat16())
    assert checkpoint.codes is not None
    assert list(checkpoint.codes.decoded) == [name]
