"""What the C++ library does not do: read files that the manifest does not name, leave files in a user's home."""

import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

from coatrt.bundle import Bundle, seal

RUN = '{"prompt": [10, 200, 30], "tokens": 4, "context": 64}'


def point_elsewhere(directory: Path, graph: str, location: str) -> None:
    """Let the tensors of a graph name another file, and seal the bundle as whoever made it would."""
    manifest = Bundle.open(directory).manifest
    model = onnx.load(directory / graph, load_external_data=False)
    entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"]
    assert entries
    entries[-1].value = location
    onnx.save(model, directory / graph)
    seal(directory, {key: value for key, value in manifest.items() if key not in ("format", "coatrt", "files")})


@pytest.mark.parametrize("location", ["unnamed.bin", "../weights.bin", "*/_ORT_MEM_ADDR_/*", "lora.safetensors"])
def test_a_graph_that_reads_another_file_is_refused(cpp: Any, tiny_bundle: Path, tmp_path: Path, location: str) -> None:
    directory = Path(shutil.copytree(tiny_bundle, tmp_path / "b"))
    point_elsewhere(directory, "cpu.onnx", location)
    shutil.copy(directory / "weights.bin", directory / "unnamed.bin")  # after the manifest: it does not name it
    shutil.copy(directory / "weights.bin", directory.parent)
    said = cpp.refusal("run", directory, RUN)
    assert said == (
        f"{directory}/cpu.onnx reads weights from '{location}', the manifest allows weights.bin; do not use this bundle"
    )


def test_the_file_that_the_manifest_gives_may_be_spelt_otherwise(cpp: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_bundle, tmp_path / "b"))
    point_elsewhere(directory, "cpu.onnx", "./weights.bin")
    assert cpp.probe("run", directory, RUN) == cpp.probe("run", tiny_bundle, RUN)


def test_a_hypernetwork_that_reads_another_file_is_refused(cpp: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_bundle, tmp_path / "b"))
    model = onnx.load(directory / "hypernet.onnx", load_external_data=False)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    onnx.save(model, directory / "hypernet.onnx")
    manifest = Bundle.open(tiny_bundle).manifest
    seal(directory, {key: value for key, value in manifest.items() if key not in ("format", "coatrt", "files")})
    (tmp_path / "c.json").write_text('{"default": "int8"}')
    said = cpp.refusal("adapt", directory, tmp_path / "c.json", tmp_path / "o")
    assert said == (
        f"{directory}/hypernet.onnx reads weights from 'weights.bin', the manifest allows none; do not use this bundle"
    )


def test_a_graph_that_is_none_is_refused(cpp: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_bundle, tmp_path / "b"))
    manifest = Bundle.open(directory).manifest
    facts = {key: value for key, value in manifest.items() if key not in ("format", "coatrt", "files")}
    (directory / "cpu.onnx").write_bytes(b"\x3a\xff")
    seal(directory, facts)
    assert "(it ends too early); build the bundle again" in cpp.refusal("run", directory, RUN)
    (directory / "cpu.onnx").rename(directory / "cpu.ort")
    facts["decoders"]["cpu"]["file"] = "cpu.ort"
    seal(directory, facts)
    assert "(its name does not end in .onnx); build the bundle again" in cpp.refusal("run", directory, RUN)


def test_onnx_runtime_leaves_no_device_id(cpp: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"default": "int8"}')
    home = tmp_path / "home"
    home.mkdir()
    clean = {key: value for key, value in cpp.environment.items() if key != "ORT_DISABLE_TELEMETRY"}
    before, cpp.environment = cpp.environment, clean
    try:
        arguments = ("probe", "adapt", tiny_bundle, tmp_path / "c.json", tmp_path / "o")
        done = cpp.run(*arguments, HOME=str(home), XDG_CACHE_HOME=str(home / "cache"))
    finally:
        cpp.environment = before
    assert done.returncode == 0, done.stderr
    assert [path for path in home.rglob("*") if path.is_file()] == []
