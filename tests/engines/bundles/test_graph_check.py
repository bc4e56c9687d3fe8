"""A bundle that was sealed anew around a damaged graph: `verify` names it, and logits that are no numbers, by graph."""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from coatrt.bundle import MANIFEST, Bundle, seal
from coatrt.engines.bundles.adapt import adapt
from coatrt.engines.bundles.graph_check import check_graph
from coatrt.engines.bundles.verify import verify
from coatrt.engines.runtime.generate import generate
from coatrt.engines.runtime.load import load_decoder
from coatrt.engines.runtime.ort import OrtDecoder
from coatrt.engines.runtime.sampling import Sampling, next_token
from coatrt.errors import BundleError
from support.seals import alter_sealed

GRAPHS = ("base.onnx", "cpu.onnx", "cuda.onnx", "hypernet.onnx")


@pytest.fixture(autouse=True)
def _no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # of numpy: something was computed with what is no number
        yield


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def reseal(directory: Path, **more: Any) -> Bundle:
    manifest = json.loads((directory / MANIFEST).read_text())
    facts = {key: value for key, value in manifest.items() if key not in ("seal", "format", "coatrt", "files")}
    seal(directory, {**facts, **more})
    return Bundle.open(directory)


def refused(bundle: Bundle) -> str:
    with pytest.raises(BundleError) as caught:
        verify(bundle, numbers=False)
    said = str(caught.value)
    assert "\n" not in said and "; " in said
    return said


BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "(no content); build the bundle again"),
    "cut": (lambda data: data[: len(data) // 2], "(Error parsing message"),
    "one byte less": (lambda data: data[:-1], "("),
    "text": (lambda data: b"<html>not found</html>\n", "(Error parsing message"),
    "zeros": (lambda data: bytes(100), "(Error parsing message"),
    "a pointer": (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "("),
}


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("case", BYTES)
def test_bytes_that_are_no_graph(copy: Path, case: str, name: str) -> None:
    change, said = BYTES[case]
    (copy / name).write_bytes(change((copy / name).read_bytes()))
    assert f"{copy / name} {said}" in refused(reseal(copy))


def _without(field: str) -> Callable[[Any], None]:
    return lambda model: model.graph.ClearField(field)


def _cut_nodes(model: Any) -> None:
    del model.graph.node[len(model.graph.node) // 2 :]


def _rename(place: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        getattr(model.graph, place)[0].name = "elsewhere"

    return change


def _longer(model: Any) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in tensor.external_data if entry.key == "length").value = str(10**9)


def _wider(model: Any) -> None:
    cache = next(value for value in model.graph.input if value.name == "past_key_values.0.key")
    cache.type.tensor_type.shape.dim[3].dim_value += 1


MODELS: dict[str, tuple[Callable[[Any], None], str]] = {
    "no graph": (lambda model: model.ClearField("graph"), "(no nodes)"),
    "no nodes": (_without("node"), "(no nodes)"),
    "no outputs": (_without("output"), "(no outputs)"),
    "no inputs": (_without("input"), "has no input input_ids, which its bundle names"),
    "no operators": (lambda model: model.ClearField("opset_import"), "(no operator set)"),
    "no version": (lambda model: model.ClearField("ir_version"), "(no IR version)"),
    "another output": (_rename("output"), "has no output logits, which its bundle names"),
    "half of its nodes": (_cut_nodes, "is not a valid ONNX graph ("),
    "no weights": (_without("initializer"), "is not a valid ONNX graph ("),
    "more than its weights have": (_longer, "reads 1000000000 bytes of weights.bin, which has"),
    "another width": (_wider, "has input past_key_values.0.key with shape"),
}


@pytest.mark.parametrize("name", GRAPHS[:3])
@pytest.mark.parametrize("case", MODELS)
def test_graphs_that_are_not_the_decoder(copy: Path, case: str, name: str) -> None:
    change, said = MODELS[case]
    model = onnx.load(copy / name, load_external_data=False)
    change(model)
    (copy / name).write_bytes(model.SerializeToString())
    shown = refused(reseal(copy))
    assert f"{copy / name} {said}" in shown or (case == "more than its weights have" and "reads" in shown), shown


def test_a_whole_bundle_passes_from_behind_a_link_too(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(copy)
    bundle = Bundle.open(tmp_path / "link")
    for form in ("engine", "cpu", "cuda"):
        check_graph(form, *bundle.decoder(form), bundle.contract)


@pytest.mark.parametrize(("content", "size"), [(b"", 0), (b"", 6), (b"engin", 6)])
def test_an_engine_of_another_size(copy: Path, content: bytes, size: int) -> None:
    (copy / "sm86.engine").write_bytes(content)
    engine = {"file": "sm86.engine", "sms": [86], "builder": "tensorrt-rtx", "version": "1", "seconds": 1.0}
    bundle = reseal(copy, engines=[{**engine, "bytes": size, "shapes": {}}])
    assert f"sm86.engine has {len(content)} bytes, its record says {size}; build the bundle again" in refused(bundle)


def _fill(name: str, value: float) -> Callable[[Any], None]:
    """Return what lets a norm of a graph have a value everywhere."""

    def change(model: Any) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if name in tensor.name)
        size = int(np.prod(tensor.dims))
        tensor.ClearField("external_data")
        tensor.data_location = onnx.TensorProto.DEFAULT
        tensor.raw_data = np.full(size, value, onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).tobytes()

    return change


@pytest.mark.parametrize(
    ("value", "said"),
    [(np.nan, "not finite (NaN or infinity)"), (np.inf, "not finite (NaN or infinity)"), (0.0, "all zero")],
)
def test_logits_that_are_no_numbers_name_their_graph(copy: Path, value: float, said: str) -> None:
    model = onnx.load(copy / "cpu.onnx", load_external_data=False)
    _fill("model.norm", value)(model)
    (copy / "cpu.onnx").write_bytes(model.SerializeToString())
    bundle = reseal(copy)
    shown = refused(bundle)
    assert f"the logits of {copy / 'cpu.onnx'} without its LoRA are {said}; build the bundle again" in shown
    if value:
        decoder = load_decoder(bundle)
        for sampling in (Sampling(), Sampling(temperature=1.0)):
            with pytest.raises(BundleError, match=r"the logits are not finite: .*; check the bundle"):
                generate(decoder, [[1, 2]], max_tokens=1, sampling=sampling)


def test_a_lora_that_makes_them_infinite_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = OrtDecoder.set_lora
    monkeypatch.setattr(
        OrtDecoder,
        "set_lora",
        lambda self, lora: bound(self, lora and {name: np.full_like(value, 3e38) for name, value in lora.items()}),
    )
    assert f"the logits of {copy / 'cpu.onnx'} with its LoRA are not finite" in refused(Bundle.open(copy))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_hypernetwork_that_emits_no_numbers_is_named(copy: Path, tmp_path: Path, value: float) -> None:
    model = onnx.load(copy / "hypernet.onnx")
    for tensor in model.graph.initializer:
        if tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16):
            kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            tensor.raw_data = np.full(int(np.prod(tensor.dims)), value, kind).tobytes()
    (copy / "hypernet.onnx").write_bytes(model.SerializeToString())
    bundle = reseal(copy)
    said = f"{copy / 'hypernet.onnx'} emits "
    assert said in refused(bundle)
    with pytest.raises(BundleError, match="with values that are not finite; train the adapter again, then build"):
        adapt(bundle, tmp_path / "l.safetensors")
    assert not (tmp_path / "l.safetensors").exists()


def test_the_next_token_of_logits_that_are_no_numbers() -> None:
    rng = np.random.default_rng(0)
    for bad in (np.nan, np.inf):
        for sampling in (Sampling(), Sampling(temperature=0.5, top_k=1)):
            with pytest.raises(BundleError, match="are not finite"):
                next_token(np.array([0.0, bad, 1.0], np.float32), sampling, rng)
    assert next_token(np.array([0.0, -np.inf, 1.0], np.float32), Sampling(), rng) == 2


@pytest.mark.parametrize("place", [(0, 1), (3, 1), (3, 2), (-1, 1)])
def test_matrices_of_another_size(copy: Path, place: tuple[int, int]) -> None:
    def change(manifest: Any) -> None:
        row = manifest["matrices"]["matrices"][place[0]]
        row[place[1]] += 1

    alter_sealed(copy / MANIFEST, change)
    assert re.search(rf"^{copy}: model\.\S+ has size \S.* in the manifest, ", refused(Bundle.open(copy)))
