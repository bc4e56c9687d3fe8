"""What an engine of TensorRT-RTX does in a step, read from the engine: it keeps its program as text.

No GPU is needed. The text is not documented; what it looks like was found in engines of TensorRT-RTX 1.7.1.
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
    """One kernel of a step.

    Args:
        kind: "function" for a generated kernel, "runtime_fusion" for a product with what is fused to it, made when the
            engine loads, "fully_connected" for a product by a library.
        name: the builder's.
        nodes: names of the ONNX nodes it computes.
        inputs: names of what it reads.
    """

    kind: str
    name: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]


def engine_program(engine: Path) -> list[Launch]:
    """Return the kernels of one call of an engine, in the order of launching.

    Raises:
        BuildError: the file holds no program of the kind that is known here.
    """
    text = engine.read_bytes().decode("latin-1")
    start, end = text.find("\nmain {"), text.find("\nshape_main {")
    if not 0 <= start < end:
        raise BuildError(f"{engine} holds no program that can be read; TensorRT-RTX 1.7.1 writes one")
    program = text[start:end]
    places = [match.start() for match in _STATEMENT.finditer(program)] + [len(program)]
    found = []
    for match, stop in zip(_STATEMENT.finditer(program), places[1:], strict=True):
        body = program[match.start() : stop]
        inputs = re.search(r"\sinput(?:_args)?=\{([^}]*)\}", body)
        read = tuple(re.findall(r'"([^"]+)"', inputs[1])) if inputs else ()
        found.append(Launch(match[1], match[2], tuple(re.findall(r"\[ONNX Layer: ([^\]]+)\]", body)), read))
    return found


def decoded_weights(program: Sequence[Launch]) -> set[str]:
    """Return the weights that a step writes to memory in 16 bits before it multiplies with them.

    A matrix is named as its product is in the graph: those that read one input may be one (`….gate_up_proj`).
    """
    return {
        match[1]
        for launch in program
        if launch.kind == "function"
        for node in launch.nodes
        if (match := _WEIGHT.match(node))
    }
