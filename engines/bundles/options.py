"""The options of a bundle; importable without torch."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from coatrt.engines.builders.builder import EngineShapes

if TYPE_CHECKING:
    from coatrt.export.graph import GraphForm
    from coatrt.planning.plan import PlanRequest

__all__ = ["BundleOptions"]


@dataclass(frozen=True)
class BundleOptions:
    """The options of a bundle.

    Args:
        activations: dtype of the engine form's activations: float16 or bfloat16.
        cpu_activations: dtype of the cpu form's activations: float32 or float16.
        context: KV cache slots per sequence in the engine form; the other forms have at least as many positions.
        shapes: ranges of the engine's dynamic dimensions.
        engine: whether to build an engine, if the device's builder can build it on this machine.
    """

    activations: str = "float16"
    cpu_activations: str = "float32"
    context: int = 2048
    shapes: EngineShapes = field(default_factory=EngineShapes)
    engine: bool = True

    @classmethod
    def of(cls, request: "PlanRequest", **changes: Any) -> "BundleOptions":
        """Return options with the context, batch and prefill length of a plan's request.

        Args:
            request: the plan's request.
            changes: the other options.
        """
        shapes = EngineShapes(request.batch, min(request.prefill, request.context))
        return cls(context=request.context, shapes=shapes, **changes)

    def forms(self) -> "tuple[GraphForm, GraphForm, GraphForm]":
        """Return the three forms of the graph: engine, cpu, cuda."""
        from coatrt.export.graph import OPEN_POSITIONS, GraphForm

        positions = max(self.context, OPEN_POSITIONS)
        return (
            GraphForm("engine", "base.onnx", self.activations, self.context),
            GraphForm("cpu", "cpu.onnx", self.cpu_activations, max_positions=positions),
            GraphForm("cuda", "cuda.onnx", "float16", max_positions=positions),
        )
