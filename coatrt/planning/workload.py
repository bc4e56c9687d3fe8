"""Workloads: what a decoder must hold and do beside its weights."""

from dataclasses import dataclass

from coatrt.adapter.description import AdapterDescription

__all__ = ["Workload"]


@dataclass(frozen=True)
class Workload:
    """What the engine must hold beside its weights.

    Args:
        layers: decoder layers.
        kv_heads: key/value heads.
        head_dim: width of a head.
        hidden: width of the residual stream.
        intermediate: width of the MLP.
        vocabulary: rows of the head.
        context: slots of the KV cache per sequence.
        batch: sequences at once.
        prefill: most prompt tokens in one call.
        lora_parameters: elements of all A and B.
        heads: query heads.
        element: bytes of an activation, a cache element and a LoRA element: 2 in engines, 4 on the CPU.
    """

    layers: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocabulary: int
    context: int
    batch: int
    prefill: int
    lora_parameters: int
    heads: int
    element: int

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache."""
        return 2 * self.element * self.layers * self.kv_heads * self.head_dim * self.context * self.batch

    @property
    def lora_bytes(self) -> int:
        """Bytes of the LoRA tensors."""
        return self.element * self.lora_parameters

    @property
    def activation_bytes(self) -> int:
        """Bytes of activations at prefill: residual and its copies, MLP, one row of logits per sequence."""
        return self.element * self.batch * (self.prefill * (6 * self.hidden + 3 * self.intermediate) + self.vocabulary)

    @classmethod
    def of(cls, adapter: AdapterDescription, context: int, batch: int, prefill: int, element: int = 2) -> "Workload":
        """Return the workload of an adapter and its model.

        Args:
            adapter: the adapter.
            context: slots of the KV cache per sequence.
            batch: sequences at once.
            prefill: most prompt tokens in one call.
            element: bytes of an activation, a cache element and a LoRA element.

        Raises:
            ConfigError: the context exceeds the model's positions.
        """
        spec = adapter.spec
        spec.check_context(context)
        return cls(
            layers=spec.layers,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            hidden=spec.hidden,
            intermediate=max(matrix.K for matrix in adapter.model.targets if matrix.kind == "down_proj"),
            vocabulary=spec.vocabulary,
            context=context,
            batch=batch,
            prefill=prefill,
            lora_parameters=adapter.lora_parameters,
            heads=spec.heads,
            element=element,
        )
