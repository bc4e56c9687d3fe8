"""What goes into a bundle; read without torch."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from coatrt.engines.builders.builder import EngineShapes

if TYPE_CHECKING:
    from coatrt.export.graph import GraphForm
    from coatrt.planning.plan import PlanRequest

__all__ = ["BundleOptions"]


@dataclass(frozen=True)
class BundleOptions:
    """What goes into a bundle.

    Args:
        activations: of the engine form: float16 or bfloat16.
        cpu_activations: of the cpu form: float32 or float16.
        context: slots of the KV cache per sequence in the engine form; the others have positions for as many.
        shapes: ranges of the engine's dynamic dimensions.
        engine: whether an engine is built where the device's builder can do so here.
    """

    activations: str = "float16"
    cpu_activations: str = "float32"
    context: int = 2048
    shapes: EngineShapes = field(default_factory=EngineShapes)
    engine: bool = True

    @classmethod
    def of(cls, request: "PlanRequest", **changes: Any) -> "BundleOptions":
        """Return the options of a plan's request: its positions, sequences and prompt tokens.

        Args:
            request: what the plan was asked.
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
