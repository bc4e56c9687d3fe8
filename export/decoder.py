"""Checkpoint and configuration → decoder graphs and their one weights file."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import onnx_ir as ir
import torch

from coatrt.configs.config import QuantConfig
from coatrt.configs.lora_contract import DecoderIO, LoraContract
from coatrt.errors import CheckpointError, ConfigError
from coatrt.export.graph import GraphBuilder, GraphForm
from coatrt.export.joining import grouped, joined
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
        ConfigError: the caches have more slots than the model has positions.
    """
    if form.cache_length is None:
        return min(spec.max_positions, form.max_positions)
    spec.check_context(form.cache_length)
    return form.cache_length


def decoder_io(checkpoint: Checkpoint, form: GraphForm) -> DecoderIO:
    """Return what a runtime has to know to bind the graph of a model in one form.

    Raises:
        CheckpointError: the model is of an unknown family.
        ConfigError: the caches have more slots than the model has positions.
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
        raise ConfigError(
            f"the configuration and the model differ in {len(wrong)} matrices, like {wrong[0]}; "
            "give a configuration resolved for this model"
        )
    if contract is not None:
        given = {tensor.matrix: (tensor.N, tensor.K, tensor.group) for tensor in contract.tensors}
        needed = {matrix.name: (matrix.N, matrix.K, fused_name(matrix.name)) for matrix in model.targets}
        if given != needed:
            raise ConfigError(
                f"the LoRA contract has {len(given)} matrices that are not the model's {len(needed)} targets in "
                "name, shape or group; make the contract from this model"
            )
    distinct = min(len({form.file for form in forms}), len({form.name for form in forms}))
    if not forms or distinct != len(forms):
        raise ConfigError(f"{len(forms)} graph forms are given; give at least one, each name and file once")


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
    """Write a model as decoder graphs, all reading one `weights.bin`; every matrix is quantized once.

    Only matrices that read one input are in memory together, so the peak does not grow with the number of layers.

    Args:
        checkpoint: the model.
        config: a format for each of its matrices.
        directory: an existing directory, which the caller makes visible only when this returns.
        forms: the graphs to write, each name once.
        contract: LoRA inputs to add to every graph; None for graphs without.
        codes: cache of encoded matrices; None encodes here and keeps nothing.
        progress: called after every matrix.

    Raises:
        CheckpointError: the family is unknown or the checkpoint has tensors the graph does not use.
        ConfigError: configuration, contract or forms do not fit the model.
        FormatError: a weight cannot be held in its format.
    """
    _check(checkpoint, config, contract, forms)
    spec = DecoderSpec.from_config(checkpoint.config)
    positions = [_max_positions(spec, form) for form in forms]
    if spec.head_dim % 8 and (refused := [form.name for form in forms if form.name != "engine"]):
        raise CheckpointError(
            f"{checkpoint.directory} has heads of {spec.head_dim} dimensions; the {refused[0]} form takes multiples of "
            "8, as ONNX Runtime's attention does; give another model, or write the engine form alone (export_decoder)"
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
    """Write encoded matrices and what `spec` says of them as graphs with one weights file.

    Args:
        directory: an existing directory.
        spec: what to compute.
        matrices: (name, codes) in network order, embedding first.
        small: returns a norm or bias by name, None where the model has none.
        forms: the graphs.
        positions: rows of each graph's rotary tables.
        tied: whether the head reads the embedding.
        contract: LoRA inputs to add; None for graphs without.
    """
    with WeightFile(directory) as weights_file:
        graphs = [GraphBuilder(form, weights_file) for form in forms]
        written = _write_matrices(matrices, graphs, tied=tied)
        for graph, weights, rows in zip(graphs, written, positions, strict=True):
            Network(graph, spec, weights, small, contract, rows).write()
    for graph in graphs:
        graph.save(directory)


def _encoded(
    checkpoint: Checkpoint, config: QuantConfig, codes: CodeStore | None, progress: Progress
) -> Iterator[tuple[str, QuantizedMatrix]]:
    """Yield every matrix's name and codes; none is held when the next one is read."""
    names = checkpoint.matrices.names
    for done, name in enumerate(names, 1):
        if codes is not None:
            yield name, codes.get(name, config[name])
        else:
            yield name, encode(checkpoint.tensor(f"{name}.weight"), config[name])
        progress(done, len(names), "matrices", name)


def _write_matrices(
    matrices: Iterable[tuple[str, QuantizedMatrix]], graphs: Sequence[GraphBuilder], *, tied: bool
) -> list[NetworkWeights]:
    """Write every matrix into every graph, those that read one input as one where that can be."""
    tables: list[Table] = []
    alone: list[dict[str, ir.Value]] = [{} for _ in graphs]
    together: list[dict[str, ir.Value]] = [{} for _ in graphs]
    widths: dict[str, int] = {}
    for group in grouped(matrices):
        name, matrix = next(iter(group.items()))
        widths |= {name: one.N for name, one in group.items()}
        whole, joint = joined(list(group.values())), fused_name(name)
        if whole is not None:
            group.clear()  # it holds copies
        for number, graph in enumerate(graphs):
            if name == EMBEDDING:
                tables.append(write_table(graph, name, matrix, head=tied))
                if (head := tables[-1].weight) is not None:
                    alone[number][HEAD] = head
            elif whole is not None:
                together[number][joint] = write_matrix(graph, joint, whole)
            else:
                alone[number].update({name: write_matrix(graph, name, one) for name, one in group.items()})
        del group, matrix, whole  # before the next ones are read
    return [NetworkWeights(*one, widths) for one in zip(tables, alone, together, strict=True)]
