"""The nodes in front of a graph: an attention mask gives what positions and indices gave, in every family and form."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from coatrt.configs.lora_contract import contract_for
from coatrt.engines.genai.graph import LORA_FILE, MASK, attention_heads, genai_graph
from coatrt.errors import BundleError
from coatrt.export.decoder import GraphForm, decoder_io
from coatrt.models.checkpoint import Checkpoint
from support.families import CPU, CUDA, Runner, export, prompts, save_model

TWO_NORMS_A_WINDOW_AND_ODD_ROTARY = ("llama-llama3-head_dim", "qwen3", "smollm3-window", "gemma", "stablelm")
LENGTHS = [7, 12]


class Session:
    """Runs a graph as onnxruntime-genai does: tokens and mask, the caches shared between calls."""

    def __init__(self, graph: Path, io: Any, slots: int = 48) -> None:
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        self.session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        shape = (2, io.kv_heads, slots, io.head_dim)
        self.names = io.present_names
        self.cache = {name: np.full(shape, np.nan, io.activations) for name in io.past_names}

    def __call__(self, ids: NDArray[Any], mask: NDArray[Any], **lora: NDArray[Any]) -> NDArray[Any]:
        feeds = {"input_ids": ids, MASK: mask, **self.cache, **lora}
        logits, *presents = self.session.run(["logits", *self.names], feeds)
        self.cache = dict(zip(self.cache, presents, strict=True))
        return np.asarray(logits, np.float32)


def random_lora(checkpoint: Checkpoint) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    shapes = contract_for(checkpoint.matrices, 16, 16).shapes
    return {name: 0.1 * rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def graphs(checkpoint: Checkpoint, directory: Path, form: GraphForm) -> dict[bool, Path]:
    """Return the graphs for the last and for all logits, with a random LoRA as default value."""
    contract = contract_for(checkpoint.matrices, 16, 16)
    export(checkpoint, directory, (form,), contract=contract)
    io, paths = decoder_io(checkpoint, form), {}
    lora = contract.graph_inputs(random_lora(checkpoint), io.activations)
    for every in (False, True):
        model = genai_graph(directory / form.file, io, lora, directory, all_logits=every)
        assert attention_heads(model) == checkpoint.config["num_attention_heads"]
        paths[every] = directory / f"{every}.onnx"
        onnx.save(model, paths[every])
    return paths


@pytest.mark.parametrize("form", [CPU, CUDA], ids=lambda form: form.name)
@pytest.mark.parametrize("name", TWO_NORMS_A_WINDOW_AND_ODD_ROTARY)
def test_unequal_prompts_get_the_logits_of_the_graph_itself(name: str, form: GraphForm, tmp_path: Path) -> None:
    save_model(tmp_path / "model", name)
    checkpoint = Checkpoint.open(tmp_path / "model")
    paths, io = graphs(checkpoint, tmp_path / "graph", form), decoder_io(checkpoint, form)
    sequences, width = prompts(96), max(LENGTHS)
    expected = Runner(checkpoint, tmp_path / "graph", form).prefill_and_decode(
        sequences, LENGTHS, random_lora(checkpoint)
    )
    ids, mask = np.zeros((2, width), np.int64), np.zeros((2, width), np.int64)
    for row, (sequence, length) in enumerate(zip(sequences, LENGTHS, strict=True)):
        ids[row, :length], mask[row, :length] = sequence[:length], 1
    tolerance = 1e-5 if form is CPU else 2e-3
    for every, path in paths.items():
        session, seen = Session(path, io), mask
        logits = session(ids, mask)
        assert logits.shape == (2, width if every else 1, 96)
        for row, length in enumerate(LENGTHS):
            prompt = slice(0, length) if every else slice(length - 1, length)
            found = logits[row, :length] if every else logits[row]
            assert np.abs(found - expected[row][prompt]).max() < tolerance
        for step in range(5):
            token = np.array([[s[n + step]] for s, n in zip(sequences, LENGTHS, strict=True)])
            seen = np.concatenate([seen, np.ones((2, 1), np.int64)], axis=1)
            logits = session(token, seen)
            for row, length in enumerate(LENGTHS):
                assert np.abs(logits[row, 0] - expected[row][length + step]).max() < tolerance


def test_lora_inputs_are_optional_and_zeros_take_the_room_of_one(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama")
    checkpoint = Checkpoint.open(tmp_path / "model")
    path = graphs(checkpoint, tmp_path / "graph", CPU)[False]
    session = Session(path, decoder_io(checkpoint, CPU))
    assert {value.name for value in session.session.get_inputs()} == {"input_ids", MASK, *session.cache}
    optional = {value.name for value in session.session.get_overridable_initializers()}
    contract = contract_for(checkpoint.matrices, 16, 16)
    assert set(contract.inputs) <= optional
    one = np.ones((2, 3), np.int64)
    own = session(one, one)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in contract.inputs.items()}
    without = session(one, one, **zeros)
    assert np.abs(own - without).max() > 0.01
    model = genai_graph(tmp_path / "graph" / CPU.file, decoder_io(checkpoint, CPU), zeros, tmp_path)
    onnx.save(model, tmp_path / "graph" / "zeros.onnx")
    size = (tmp_path / LORA_FILE).stat().st_size
    assert size < max(value.nbytes for value in zeros.values()) + 64
    (tmp_path / LORA_FILE).rename(tmp_path / "graph" / LORA_FILE)
    assert np.array_equal(Session(tmp_path / "graph" / "zeros.onnx", decoder_io(checkpoint, CPU))(one, one), without)


def test_a_graph_with_another_input_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama")
    checkpoint = Checkpoint.open(tmp_path / "model")
    export(checkpoint, tmp_path / "graph")
    model = onnx.load(tmp_path / "graph" / CPU.file, load_external_data=False)
    model.graph.input.add(name="more")
    onnx.save(model, tmp_path / "graph" / CPU.file)
    io = decoder_io(checkpoint, CPU)
    with pytest.raises(BundleError, match=r"cpu\.onnx has more, which its bundle does not name"):
        genai_graph(tmp_path / "graph" / CPU.file, io, {}, tmp_path)
    del model.graph.input[-1]
    next(value for value in model.graph.output if value.name == "logits").name = "more"
    onnx.save(model, tmp_path / "graph" / CPU.file)
    with pytest.raises(BundleError, match="has no logits"):
        genai_graph(tmp_path / "graph" / CPU.file, io, {}, tmp_path)
    with pytest.raises(BundleError, match="has no GroupQueryAttention"):
        attention_heads(onnx.ModelProto())
