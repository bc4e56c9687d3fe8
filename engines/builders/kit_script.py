"""Builds this bundle's engine with TensorRT, on the GPU that will run it (python build_engine.py).

Needs only the `tensorrt` package. The graph's hashes are checked, and the engine is added to manifest.json.
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
    """Say one line and stop."""
    sys.exit(f"build_engine: {message}")


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    value = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            value.update(piece)
    return value.hexdigest()


def sealed(rest: str) -> str:
    """Return the text of a manifest whose lines behind the seal are `rest` (docs/bundle.md)."""
    return f'{{\n "seal": "{hashlib.sha256(rest.encode()).hexdigest()}",\n{rest}'


def read_manifest() -> dict[str, Any]:
    """Return the manifest without its seal, which is checked first."""
    text = (HERE / "manifest.json").read_text(encoding="utf-8")
    if text != sealed(text.partition(",\n")[2]):
        fail("manifest.json was altered or is damaged; copy the bundle again")
    manifest: dict[str, Any] = json.loads(text)
    del manifest["seal"]
    return manifest


def check(recipe: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Refuse altered files and another GPU."""
    for name in ("build.json", recipe["graph"], recipe["weights"]):
        if digest(HERE / name) != manifest["files"][name]["sha256"]:
            fail(f"{name} is not what the manifest says; copy the bundle again")
    if shutil.which("nvidia-smi") is None:
        return
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    if said and said[0].replace(".", "") != str(recipe["sm"]):
        fail(f"this GPU has compute capability {said[0]}, the bundle is for SM{recipe['sm']}; build on that device")


def ranges(network: Any, shapes: dict[str, int]) -> Iterator[tuple[str, list[int], list[int]]]:
    """Yield each input's name, least shape and greatest shape."""
    limits = {"input_ids": shapes["prefill"], "position_ids": shapes["prefill"], "logits_index": shapes["logits"]}
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        least = [1 if size < 0 else size for size in tensor.shape]
        most = [
            size if size >= 0 else shapes["batch"] if axis == 0 else limits[tensor.name]
            for axis, size in enumerate(tensor.shape)
        ]
        yield tensor.name, least, most


def build(recipe: dict[str, Any], trt: Any) -> bytes:
    """Return the engine: one profile over every dynamic dimension, tuned for decoding one token."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(HERE / recipe["graph"])):
        fail(f"TensorRT refuses the graph: {parser.get_error(0)}")
    profile = builder.create_optimization_profile()
    for name, least, most in ranges(network, recipe["shapes"]):
        profile.set_shape(name, least, least, most)
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        fail("TensorRT built no engine; its messages above say why")
    return bytes(engine)


def main() -> None:
    """Build and enter into the manifest."""
    manifest = read_manifest()
    recipe = json.loads((HERE / "build.json").read_text(encoding="utf-8"))
    check(recipe, manifest)
    try:
        import tensorrt as trt
    except ImportError:
        fail("the package tensorrt is not installed; pip install tensorrt")
    print(f"building {recipe['engine']} with TensorRT {trt.__version__}", flush=True)
    started = time.monotonic()
    data = build(recipe, trt)
    seconds = time.monotonic() - started
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
    (HERE / "model.sig").unlink(missing_ok=True)  # it was made over the manifest of before
    print(f"{name}: {len(data) / 1e6:.1f} MB in {seconds:.0f} s, entered into manifest.json")


if __name__ == "__main__":
    main()
