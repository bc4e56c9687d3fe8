"""Reads from a TensorRT-RTX engine which kernels a step launches: the engine contains its program as text.

No GPU is needed. The text is not documented; the patterns here match engines of TensorRT-RTX 1.7.1.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coatrt.errors import BuildError

__all__ = ["Launch", "decoded_weights", "engine_program"]

_STATEMENT = re.compile(r'^  (function|runtime_fusion|fully_connected)=\{ name="?([^ "]+)', re.MULTILINE)
_WEIGHT = re.compile(r"(model\.layers\.\d+\.[a-z_.]+)\.weight(\.|$)")


@dataclass(frozen=True)
class Launch:
    """One kernel launch of a step.

    Args:
        kind: "function" for a generated kernel, "runtime_fusion" for a product and its fused neighbours, compiled when
            the engine loads, "fully_connected" for a library's product.
        name: the builder's name for it.
        nodes: names of the ONNX nodes it computes.
        inputs: names of its inputs.
    """

    kind: str
    name: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]


def engine_program(engine: Path) -> list[Launch]:
    """Return the kernels that an engine launches in one call, in order.

    Raises:
        BuildError: the file has no program in the format of TensorRT-RTX 1.7.1.
    """
    text = engine.read_bytes().decode("latin-1")
    start, end = text.find("\nmain {"), text.find("\nshape_main {")
    if not 0 <= start < end:
        raise BuildError(f"no readable program in {engine}; give an engine built by TensorRT-RTX 1.7.1")
    program = text[start:end]
    starts = [match.start() for match in _STATEMENT.finditer(program)] + [len(program)]
    launches = []
    for match, stop in zip(_STATEMENT.finditer(program), starts[1:], strict=True):
        body = program[match.start() : stop]
        inputs = re.search(r"\sinput(?:_args)?=\{([^}]*)\}", body)
        names = tuple(re.findall(r'"([^"]+)"', inputs[1])) if inputs else ()
        launches.append(Launch(match[1], match[2], tuple(re.findall(r"\[ONNX Layer: ([^\]]+)\]", body)), names))
    return launches


def decoded_weights(program: Sequence[Launch]) -> set[str]:
    """Return the weights that a step decodes to memory in 16 bits before their product.

    A matrix is named like its product in the graph; a fused group has one name (`….gate_up_proj`).
    """
    return {
        match[1]
        for launch in program
        if launch.kind == "function"
        for node in launch.nodes
        if (match := _WEIGHT.match(node))
    }
