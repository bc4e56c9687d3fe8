"""Checkpoint and configuration → decoder graphs that share one weights file."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import onnx_ir as ir
import torch

from coatrt.configs.config import QuantConfig
from coatrt.configs.lora_contract import DecoderIO, LoraContract
from coatrt.errors import CheckpointError, ConfigError
from coatrt.export.graph import GraphBuilder, GraphForm
from coatrt.export.joining import fused_groups, join
from coatrt.export.network import Network
from coatrt.export.projections import NetworkWeights
from coatrt.export.weight_file import WEIGHTS_FILE, WeightFile
from coatrt.export.weights import Table, write_matrix, write_table
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.exportable import check_tensors
from coatrt.models.matrices import EMBEDDING, HEAD, fused_name
from coatrt.models.spec import DecoderSpec
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.codec import QuantizedMatrix, encode
from coatrt.system.progress import Progress, silent

__all__ = ["WEIGHTS_FILE", "DecoderIO", "GraphForm", "decoder_io", "export_decoder", "write_graphs"]


def _max_positions(spec: DecoderSpec, form: GraphForm) -> int:
    """Return the rows of the rotary tables.

    Raises:
        ConfigError: the cache length exceeds the model's positions.
    """
    if form.cache_length is None:
        return min(spec.max_positions, form.max_positions)
    spec.check_context(form.cache_length)
    return form.cache_length


def decoder_io(checkpoint: Checkpoint, form: GraphForm) -> DecoderIO:
    """Return the inputs and outputs of a model's graph in one form, as a runtime needs them.

    Raises:
        CheckpointError: the model's family is unknown.
        ConfigError: the cache length exceeds the model's positions.
    """
    spec = DecoderSpec.from_config(checkpoint.config)
    return DecoderIO(
        layers=spec.layers,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        vocabulary=spec.vocabulary,
        cache_length=form.cache_length,
        activations=form.activations,
        max_positions=_max_positions(spec, form),
    )


def _check(
    checkpoint: Checkpoint, config: QuantConfig, contract: LoraContract | None, forms: Sequence[GraphForm]
) -> None:
    model = checkpoint.matrices
    if set(config.formats) != set(model.names):
        wrong = sorted(set(config.formats) ^ set(model.names))
        names = wrong[0] if len(wrong) == 1 else f"{wrong[0]} and {len(wrong) - 1} more matrices"
        raise ConfigError(
            f"the configuration and the model differ in {names}; give a configuration resolved for this model"
        )
    if contract is not None:
        targets = {tensor.matrix: (tensor.N, tensor.K, tensor.group) for tensor in contract.tensors}
        expected = {matrix.name: (matrix.N, matrix.K, model.fused[matrix.name]) for matrix in model.targets}
        if targets != expected:
            raise ConfigError(
                f"the LoRA contract's {len(targets)} target modules differ from the model's {len(expected)} in name, "
                "shape or fused group; create the contract from this model"
            )
    if not forms:
        raise ConfigError("no graph form to write; give at least one")
    distinct = min(len({form.file for form in forms}), len({form.name for form in forms}))
    if distinct != len(forms):
        raise ConfigError(f"each graph form needs its own name and file, got {distinct} for {len(forms)} forms")


def export_decoder(
    checkpoint: Checkpoint,
    config: QuantConfig,
    directory: Path,
    *,
    forms: Sequence[GraphForm],
    contract: LoraContract | None = None,
    codes: CodeStore | None = None,
    progress: Progress = silent,
) -> None:
    """Write a model as decoder graphs that share one `weights.bin`; every matrix is quantized once.

    Only the matrices of one fused group are in memory together, so the peak does not grow with the number of layers.

    Args:
        checkpoint: the model.
        config: a format for each of its matrices.
        directory: an existing directory; the caller publishes it only after this returns.
        forms: the graphs to write; names and files must differ.
        contract: LoRA inputs to add to every graph; None for graphs without LoRA.
        codes: cache of encoded matrices; None encodes without a cache.
        progress: called after every matrix.

    Raises:
        CheckpointError: the family is unknown, a form does not support the model's heads, or the checkpoint has tensors
            that the graph does not use.
        ConfigError: configuration, contract or forms do not fit the model.
        FormatError: a weight cannot be stored in its format.
    """
    _check(checkpoint, config, contract, forms)
    spec = DecoderSpec.from_config(checkpoint.config)
    positions = [_max_positions(spec, form) for form in forms]
    if spec.head_dim % 8 and (runtime_forms := [form.name for form in forms if form.name != "engine"]):
        raise CheckpointError(
            f"{checkpoint.directory}: head_dim must be a multiple of 8 for the {runtime_forms[0]} form (ONNX Runtime's "
            f"attention), got {spec.head_dim}; use another model, or write the engine form alone (export_decoder)"
        )
    check_tensors(checkpoint)
    matrices = _encoded(checkpoint, config, codes, progress)

    def small(name: str) -> torch.Tensor | None:
        return checkpoint.tensor(name) if name in checkpoint.tensors else None

    write_graphs(directory, spec, matrices, small, forms, positions, tied=checkpoint.matrices.tied, contract=contract)


def write_graphs(
    directory: Path,
    spec: DecoderSpec,
    matrices: Iterable[tuple[str, QuantizedMatrix]],
    small: Callable[[str], torch.Tensor | None],
    forms: Sequence[GraphForm],
    positions: Sequence[int],
    *,
    tied: bool,
    contract: LoraContract | None = None,
) -> None:
    """Write encoded matrices as the graphs of a decoder, with one weights file.

    Args:
        directory: an existing directory.
        spec: the decoder's architecture.
        matrices: (name, codes) in network order, embedding first.
        small: returns a norm or bias by name; None if the model has none of that name.
        forms: the graphs to write.
        positions: rows of each graph's rotary tables.
        tied: whether the head shares the embedding's weight.
        contract: LoRA inputs to add; None for graphs without LoRA.
    """
    with WeightFile(directory) as weights_file:
        graphs = [GraphBuilder(form, weights_file) for form in forms]
        stored = _write_matrices(matrices, graphs, tied=tied)
        for graph, weights, rows in zip(graphs, stored, positions, strict=True):
            Network(graph, spec, weights, small, contract, rows).write()
    for graph in graphs:
        graph.save(directory)


def _encoded(
    checkpoint: Checkpoint, config: QuantConfig, codes: CodeStore | None, progress: Progress
) -> Iterator[tuple[str, QuantizedMatrix]]:
    """Yield every matrix's name and codes; each is released before the next one is read."""
    names = checkpoint.matrices.names
    for count, name in enumerate(names, 1):
        if codes is not None:
            yield name, codes.get(name, config[name])
        else:
            yield name, encode(checkpoint.tensor(f"{name}.weight"), config[name])
        progress(count, len(names), "matrices", name)


def _write_matrices(
    matrices: Iterable[tuple[str, QuantizedMatrix]], graphs: Sequence[GraphBuilder], *, tied: bool
) -> list[NetworkWeights]:
    """Write every matrix into every graph; a fused group becomes one matrix where its codes allow it."""
    tables: list[Table] = []
    single: list[dict[str, ir.Value]] = [{} for _ in graphs]
    fused: list[dict[str, ir.Value]] = [{} for _ in graphs]
    widths: dict[str, int] = {}
    for group in fused_groups(matrices):
        name, matrix = next(iter(group.items()))
        widths |= {name: member.N for name, member in group.items()}
        joint, joint_name = join(list(group.values())), fused_name(name)
        if joint is not None:
            group.clear()  # the joint matrix is a copy; free its members
        for number, graph in enumerate(graphs):
            if name == EMBEDDING:
                tables.append(write_table(graph, name, matrix, head=tied))
                if (head := tables[-1].weight) is not None:
                    single[number][HEAD] = head
            elif joint is not None:
                fused[number][joint_name] = write_matrix(graph, joint_name, joint)
            else:
                single[number].update({name: write_matrix(graph, name, member) for name, member in group.items()})
        del group, matrix, joint  # free them before the next group is read
    return [NetworkWeights(*weights, widths) for weights in zip(tables, single, fused, strict=True)]
