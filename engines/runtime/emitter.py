"""The hypernetwork at deploy time: emits the LoRA of any configuration, in ONNX Runtime, without torch."""

from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from coatrt.bundle import Bundle
from coatrt.configs.config import QuantConfig
from coatrt.configs.lora_contract import LoraContract
from coatrt.engines.runtime.lora_file import Lora
from coatrt.engines.runtime.ort import session
from coatrt.errors import BundleError, ConfigError, reason
from coatrt.system.json_data import read_as

__all__ = ["Emitter"]


class _Inputs(TypedDict):
    """The content of hypernet.json: the order of the input's matrices, and the format each integer stands for."""

    matrices: tuple[str, ...]
    formats: tuple[str, ...]


class Emitter:
    """A loaded hypernetwork.

    Args:
        graph: hypernet.onnx; hypernet.json beside it has "matrices" (order of the input) and "formats" (the format each
            integer stands for).
        contract: names and shapes of the tensors it emits.
        threads: threads of the session; None for all usable cores.

    Raises:
        BundleError: hypernet.json is damaged.
        BuildError: ONNX Runtime refuses the graph.
    """

    def __init__(self, graph: Path, contract: LoraContract, threads: int | None = None) -> None:
        side = graph.with_name("hypernet.json")
        inputs = read_as(side, _Inputs, "hypernetwork description", "build the bundle again", BundleError)
        self.matrices, self.formats = inputs["matrices"], inputs["formats"]
        self.contract = contract
        self._names = list(contract.shapes)
        self._index = {text: i for i, text in enumerate(self.formats)}
        self._graph, self._session = graph, session(graph, threads)

    @classmethod
    def of(cls, bundle: Bundle, threads: int | None = None) -> "Emitter":
        """Return the hypernetwork of a bundle; the hash of every file is checked first."""
        bundle.path("hypernet.json")
        weights = "hypernet.bin" if "hypernet.bin" in bundle.manifest["files"] else ""
        if weights:
            bundle.path(weights)
        return cls(bundle.graph("hypernet.onnx", weights), bundle.contract, threads)

    def ids(self, config: QuantConfig) -> NDArray[np.int64]:
        """Return the hypernetwork's input for a configuration, int64 [M].

        Raises:
            ConfigError: a matrix has no format, or a format the adapter was not trained for.
        """
        result = np.empty(len(self.matrices), np.int64)
        for i, name in enumerate(self.matrices):
            fmt = config.formats.get(name)
            if str(fmt) not in self._index:
                problem = f"is {fmt}, which the adapter was not trained for" if fmt else "has no format"
                raise ConfigError(f"{name} {problem}; allowed: {', '.join(self.formats)}")
            result[i] = self._index[str(fmt)]
        return result

    def emit(self, config: QuantConfig) -> Lora:
        """Return the LoRA of a configuration: every tensor of the contract, float32.

        Raises:
            ConfigError: see `ids`.
            BundleError: the graph lacks a tensor of the contract, or emits values that are not finite.
        """
        ids = self.ids(config)
        try:
            values = self._session.run(self._names, {"formats": ids})
        except Exception as error:  # onnxruntime raises types of its own that share no public base
            raise BundleError(
                f"the hypernetwork does not match its contract ({reason(error)}); build the bundle again"
            ) from None
        for name, value in zip(self._names, values, strict=True):
            if not np.isfinite(value).all():
                raise BundleError(
                    f"{self._graph} emits {name} with values that are not finite; train the adapter again, then build"
                )
        return Lora(dict(zip(self._names, values, strict=True)), config.hash)
