"""The builder process: `python -m coatrt.engines.builders.worker REQUEST`, a JSON text; it ends with its parent."""

import json
import sys
from pathlib import Path
from typing import Any

from coatrt.engines.builders.kit_script import ranges
from coatrt.system.processes import end_with_parent

__all__ = ["build"]


def build(request: dict[str, Any]) -> None:
    """Build the engine of a request, tuned for decoding one token, and write it to the request's path."""
    from polygraphy.backend.trt import CreateConfig, Profile, engine_bytes_from_network, network_from_onnx_path
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.ERROR
    builder, network, parser = network_from_onnx_path(request["graph"], strongly_typed=True)
    profile = Profile()
    for name, smallest, largest in ranges(network, request["shapes"]):
        profile.add(name, min=smallest, opt=smallest, max=largest)
    options: dict[str, Any] = {"profiles": [profile]}
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
    request = json.loads(sys.argv[1])
    end_with_parent(request["parent"])
    build(request)
