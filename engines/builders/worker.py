"""The builder process: `python -m coatrt.engines.builders.worker request.json`."""

import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["build"]


def _profile(network: Any, shapes: dict[str, int]) -> Any:
    """Return one profile over every dynamic dimension, tuned for decoding one token."""
    from polygraphy.backend.trt import Profile

    limits = {"input_ids": shapes["prefill"], "position_ids": shapes["prefill"], "logits_index": shapes["logits"]}
    profile = Profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        least = [1 if size < 0 else size for size in tensor.shape]
        most = [
            size if size >= 0 else shapes["batch"] if axis == 0 else limits[tensor.name]
            for axis, size in enumerate(tensor.shape)
        ]
        profile.add(tensor.name, min=least, opt=least, max=most)
    return profile


def build(request: dict[str, Any]) -> None:
    """Build the engine that a request describes and write it to the request's path."""
    from polygraphy.backend.trt import CreateConfig, engine_bytes_from_network, network_from_onnx_path
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.ERROR
    builder, network, parser = network_from_onnx_path(request["graph"], strongly_typed=True)
    options: dict[str, Any] = {"profiles": [_profile(network, request["shapes"])]}
    if request["builder"] == "tensorrt-rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        capabilities = [divmod(sm, 10) for sm in request["sms"]]
        config = CreateConfigRTX(compute_capabilities=capabilities, **options)
    else:
        config = CreateConfig(**options)
    engine = engine_bytes_from_network((builder, network, parser), config=config)
    with Path(request["engine"]).open("wb") as stream:
        stream.write(memoryview(engine))


if __name__ == "__main__":
    build(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
