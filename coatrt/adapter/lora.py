"""The configuration-aware LoRA as one module: A and B of all matrices stacked by shape, U from the hypernetwork, C."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from coatrt.adapter.compensation import Compensator, Reading
from coatrt.adapter.features import ConfigEncoder
from coatrt.adapter.hypernetwork import Hypernetwork
from coatrt.adapter.preset import Preset
from coatrt.configs.config import QuantConfig
from coatrt.configs.lora_contract import LoraContract
from coatrt.system.progress import Progress, silent
from coatrt.system.tensors import to_device

__all__ = ["CoaLora"]


class _Steps:
    """Counter of the steps of all optimizers."""

    def __init__(self) -> None:
        self.count = 0
        register_optimizer_step_post_hook(self._step)

    def _step(self, *_: object) -> None:
        self.count += 1


_steps = _Steps()


class CoaLora(nn.Module):
    """y = Q(W)x + (s·B(I + U) + C)A x, with U = θ(configuration) and C the compensation term of the matrix's format.

    While A is trained, C comes from a `Compensator` (`coatrt.adapter.compensation`); `settle` stores it as a table. One
    bmm per matrix shape multiplies I + U into B: A is the same for every configuration.

    Args:
        contract: names, shapes, ranks and scale.
        encoder: encoder of configurations.
        preset: preset of θ; "none": no θ, U = 0 for every configuration.
        seed: seed of the initial values: A normal with variance 1/K (unit gain), B zero.
        compensated: whether to create the table of C, float16 [formats, r, N] per matrix, filled with zeros.
    """

    def __init__(
        self,
        contract: LoraContract,
        encoder: ConfigEncoder,
        preset: Preset = "coatrt",
        seed: int = 0,
        compensated: bool = False,
    ) -> None:
        super().__init__()
        self.contract = contract
        self.encoder = encoder
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.theta = (
                Hypernetwork(preset, contract.rank, encoder.layers, len(encoder.module_kinds))
                if preset != "none"
                else None
            )
            shapes: dict[tuple[int, int, int], list[int]] = {}
            for i, tensor in enumerate(contract.tensors):
                shapes.setdefault((tensor.K, tensor.N, tensor.rank), []).append(i)
            self._members = tuple(shapes.values())
            self.A = nn.ParameterList(torch.randn(len(rows), K, r) / K**0.5 for (K, _, r), rows in shapes.items())
            self.B = nn.ParameterList(torch.zeros(len(rows), r, N) for (_, N, r), rows in shapes.items())
        self._compensator: Compensator | None = None
        self._readings: dict[int, tuple[tuple[int, int], Reading]] = {}
        if compensated:
            self._set_tables(
                [
                    torch.zeros(len(rows), len(encoder.formats), r, N, dtype=torch.float16)
                    for (_, N, r), rows in shapes.items()
                ]
            )

    def compensate(
        self,
        compensator: Compensator,
        gains: Mapping[str, Tensor] | None = None,
        share: float = 1.0,
        progress: Progress = silent,
    ) -> None:
        """Use a compensator for C from now on.

        Args:
            compensator: compensator of the LoRA's model.
            gains: see `coatrt.evaluation.curvature.output_gains`; A starts with the directions that compensate most in
                the format of fewest bits, B with zero. None leaves both unchanged.
            share: share of A's columns with such directions; the others are random.
            progress: called after each matrix.
        """
        self._compensator = compensator
        self._readings.clear()
        if gains is None:
            return
        lowest = min(self.encoder.formats, key=lambda fmt: fmt.bits_per_weight(self.contract.tensors[0].K))
        total, count = len(self.contract.tensors), 0
        with torch.no_grad():
            for rows, A, B in self.stacks():
                B.zero_()
                for i, row in enumerate(rows):
                    tensor = self.contract.tensors[row]
                    A[i].copy_(compensator.start(tensor, lowest, gains[tensor.matrix], row, share))
                    count += 1
                    progress(count, total, "LoRA directions")

    def settle(self, progress: Progress = silent) -> None:
        """Store C of the current A for every matrix and format, and release the compensator."""
        compensator = self._compensator
        if compensator is None:
            return
        contract, formats = self.contract, len(self.encoder.formats)
        tables = [B.new_zeros(len(B), formats, *B.shape[1:], dtype=torch.float16) for B in self.B]
        for f, fmt in enumerate(self.encoder.formats):  # format by format, so that no weight is decoded twice
            for i, (rows, A, _) in enumerate(self.stacks()):
                names = [contract.tensors[row].matrix for row in rows]
                tables[i][:, f] = compensator.terms(names, [fmt] * len(names), self._read(compensator, i, names, A))
            progress(f + 1, formats, "compensation")
        self._set_tables(tables)
        self._compensator = None
        self._readings.clear()

    def _set_tables(self, tables: Sequence[Tensor]) -> None:
        """Register C [m, formats, r, N] of each stack as buffers of the module."""
        for i, table in enumerate(tables):
            self.register_buffer(f"C_{i}", table)

    @property
    def C(self) -> list[Tensor]:
        """C per stack, float16 [m, formats, r, N]; empty without compensation or while A is trained."""
        return [table for name, table in self.named_buffers() if name.startswith("C_")]

    @property
    def compensated(self) -> bool:
        """Whether the module has tables of C."""
        return len(self.C) > 0

    def stacks(self) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Yield (indices in the contract, A [m, K, r], B [m, r, N]) for every distinct matrix shape."""
        yield from zip(self._members, self.A, self.B, strict=True)

    @property
    def preset(self) -> Preset:
        """Preset of θ."""
        return self.theta.preset if self.theta is not None else "none"

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters of "A", "B" and, if it exists, "theta"; each group has its own learning rate."""
        groups = {"A": list(self.A), "B": list(self.B)}
        return groups if self.theta is None else {**groups, "theta": list(self.theta.parameters())}

    def pairs(self, config: QuantConfig, dtype: torch.dtype = torch.float32) -> dict[str, tuple[Tensor, Tensor]]:
        """Return matrix name → (A [K, r], B' [r, N]) for a configuration, B' = s·(I + U)ᵀB + C, cast to `dtype`."""
        ids, device, updates = self.encoder.format_ids(config), self.A[0].device, None
        if self.theta is not None:
            order = [
                row for rows in self._members for row in rows
            ]  # in the order of stacks, so that the result is split without gathering
            inputs = (tensor[order] for tensor in (self.encoder.indices(ids), self.encoder.features(ids)))
            updates = self.theta(*(to_device(tensor, device) for tensor in inputs)).split([*map(len, self._members)])
        tables = self.C
        result: dict[str, tuple[Tensor, Tensor]] = {}
        for stack, (rows, A, B) in enumerate(self.stacks()):
            r = A.shape[-1]
            updated = B if updates is None else torch.baddbmm(B, updates[stack][:, :r, :r].mT, B)
            scaled = updated * self.contract.scale(self.contract.tensors[rows[0]])
            if tables:
                scaled = scaled + tables[stack][torch.arange(len(rows)), ids[rows]].float()
            elif self._compensator is not None:
                names = [self.contract.tensors[row].matrix for row in rows]
                formats = [self.encoder.formats[i] for i in ids[rows].tolist()]
                reading = self._read(self._compensator, stack, names, A)
                scaled = scaled + self._compensator.terms(names, formats, reading, exact=False)
            for row, a, b in zip(rows, A.to(dtype).unbind(0), scaled.to(dtype).unbind(0), strict=True):
                result[self.contract.tensors[row].matrix] = (a, b)
        return result

    def _read(self, compensator: Compensator, stack: int, names: list[str], A: Tensor) -> Reading:
        """Return the part of C that depends on A, computed again only after A changed.

        Changes are detected by counters, without waiting for a GPU: torch's counter of in-place changes and, as fused
        optimizers bypass it, that of optimizer steps.
        """
        now = (A._version, _steps.count)
        if stack not in self._readings or self._readings[stack][0] != now:
            self._readings[stack] = (now, compensator.reading(names, A.detach()))
        return self._readings[stack][1]

    @torch.no_grad()
    def emit(self, config: QuantConfig) -> dict[str, Tensor]:
        """Return every tensor of the contract for a configuration, float32, in contract order."""
        pairs, result = self.pairs(config), {}
        for tensor in self.contract.tensors:
            a, b = pairs[tensor.matrix]
            result[tensor.A], result[tensor.B] = a.detach().cpu().clone(), b.detach().cpu().clone()
        return result

    def shared(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return matrix name → (A [K, r], B [r, N]) as trained: no U, no C, B not scaled."""
        return {
            self.contract.tensors[row].matrix: (A[i].detach(), B[i].detach())
            for rows, A, B in self.stacks()
            for i, row in enumerate(rows)
        }
