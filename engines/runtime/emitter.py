"""The hypernetwork at deploy time: a configuration → its LoRA, in ONNX Runtime, without torch."""

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
    """What hypernet.json says of the input: the order of its matrices, and what its integers mean."""

    matrices: tuple[str, ...]
    formats: tuple[str, ...]


class Emitter:
    """A loaded hypernetwork.

    Args:
        graph: hypernet.onnx; hypernet.json beside it has "matrices" (order of the input) and "formats" (what its
            integers mean).
        contract: names and shapes of what it emits.
        threads: of the session.

    Raises:
        BundleError: hypernet.json is garbled.
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
        """Return the hypernetwork of a bundle, every file's hash checked first."""
        bundle.path("hypernet.json")
        weights = "hypernet.bin" if "hypernet.bin" in bundle.manifest["files"] else ""
        if weights:
            bundle.path(weights)
        return cls(bundle.graph("hypernet.onnx", weights), bundle.contract, threads)

    def ids(self, config: QuantConfig) -> NDArray[np.int64]:
        """Return the hypernetwork's input for a configuration, int64 [M].

        Raises:
            ConfigError: a matrix has no format, or one the adapter was not trained for.
        """
        result = np.empty(len(self.matrices), np.int64)
        for i, name in enumerate(self.matrices):
            text = str(config.formats.get(name, "nothing"))
            if text not in self._index:
                raise ConfigError(
                    f"{name} is {text}, which the adapter was not trained for; allowed: {', '.join(self.formats)}"
                )
            result[i] = self._index[text]
        return result

    def emit(self, config: QuantConfig) -> Lora:
        """Return the LoRA of a configuration: every tensor of the contract, float32.

        Raises:
            ConfigError: see `ids`.
            BundleError: the graph does not have the contract's tensors, or emits numbers that are not finite.
        """
        ids = self.ids(config)
        try:
            values = self._session.run(self._names, {"formats": ids})
        except Exception as error:  # onnxruntime raises types of its own that share no public base
            raise BundleError(
                f"the hypernetwork does not fit its contract ({reason(error)}); build the bundle again"
            ) from None
        for name, value in zip(self._names, values, strict=True):
            if not np.isfinite(value).all():
                raise BundleError(
                    f"{self._graph} emits {name} with numbers that are not finite; train the adapter again, then build"
                )
        return Lora(dict(zip(self._names, values, strict=True)), config.hash)
