"""Builds this bundle's engine with TensorRT on the GPU that will run it (python build_engine.py).

Needs only the package `tensorrt`. Checks the graph's hashes and adds the engine to manifest.json.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def fail(message: str) -> None:
    """Print one line to standard error and exit with code 1."""
    sys.exit(f"build_engine: {message}")


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    value = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            value.update(piece)
    return value.hexdigest()


def sealed(rest: str) -> str:
    """Return the text of a manifest with its seal; `rest` are the lines after the seal (docs/reference/bundle.md)."""
    return f'{{\n "seal": "{hashlib.sha256(rest.encode()).hexdigest()}",\n{rest}'


def read_manifest() -> dict[str, Any]:
    """Return the manifest without its seal, after checking the seal."""
    text = (HERE / "manifest.json").read_text(encoding="utf-8")
    if text != sealed(text.partition(",\n")[2]):
        fail("manifest.json was altered or is damaged; copy the bundle again")
    manifest: dict[str, Any] = json.loads(text)
    del manifest["seal"]
    return manifest


def check(recipe: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Refuse altered files and a GPU of another compute capability."""
    for name in ("build.json", recipe["graph"], recipe["weights"]):
        if digest(HERE / name) != manifest["files"][name]["sha256"]:
            fail(f"{name} does not match its hash in manifest.json; copy the bundle again")
    if shutil.which("nvidia-smi") is None:
        return
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    gpus = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    if gpus and gpus[0].replace(".", "") != str(recipe["sm"]):
        fail(f"this GPU has compute capability {gpus[0]}, the bundle is for SM{recipe['sm']}; build on that device")


def ranges(network: Any, shapes: dict[str, int]) -> Iterator[tuple[str, list[int], list[int]]]:
    """Yield each input's name, smallest shape and largest shape."""
    limits = {"input_ids": shapes["prefill"], "position_ids": shapes["prefill"], "logits_index": shapes["logits"]}
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        smallest = [1 if size < 0 else size for size in tensor.shape]
        largest = [
            size if size >= 0 else shapes["batch"] if axis == 0 else limits[tensor.name]
            for axis, size in enumerate(tensor.shape)
        ]
        yield tensor.name, smallest, largest


def build(recipe: dict[str, Any], trt: Any) -> bytes:
    """Return the engine: one optimization profile for all dynamic dimensions, tuned for decoding one token."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(HERE / recipe["graph"])):
        fail(f"TensorRT refuses the graph: {parser.get_error(0)}")
    profile = builder.create_optimization_profile()
    for name, smallest, largest in ranges(network, recipe["shapes"]):
        profile.set_shape(name, smallest, smallest, largest)
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        fail("TensorRT built no engine; see its messages above")
    return bytes(engine)


def main() -> None:
    """Build the engine and add it to the manifest."""
    manifest = read_manifest()
    recipe = json.loads((HERE / "build.json").read_text(encoding="utf-8"))
    check(recipe, manifest)
    try:
        import tensorrt as trt
    except ImportError:
        fail("the package tensorrt is not installed; pip install tensorrt")
    print(f"building {recipe['engine']} with TensorRT {trt.__version__}", flush=True)
    start = time.monotonic()
    data = build(recipe, trt)
    seconds = time.monotonic() - start
    path, name = HERE / recipe["engine"], recipe["engine"]
    path.with_suffix(".part").write_bytes(data)
    path.with_suffix(".part").replace(path)
    record = {
        "file": name,
        "sms": [recipe["sm"]],
        "builder": "tensorrt",
        "version": trt.__version__,
        "seconds": seconds,
        "bytes": len(data),
        "shapes": recipe["shapes"],
    }
    manifest["engines"] = [engine for engine in manifest["engines"] if engine["file"] != name] + [record]
    manifest["files"][name] = {"sha256": digest(path), "bytes": len(data)}
    part = HERE / "manifest.json.part"
    part.write_text(sealed(json.dumps(manifest, indent=1).removeprefix("{\n") + "\n"), encoding="utf-8")
    part.replace(HERE / "manifest.json")
    (HERE / "model.sig").unlink(missing_ok=True)  # it signed the previous manifest
    print(f"{name}: {len(data) / 1e6:.1f} MB in {seconds:.0f} s, added to manifest.json")


if __name__ == "__main__":
    main()
