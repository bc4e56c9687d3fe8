"""Rows that do not depend on each other: bit for bit, in any company, in any pieces."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coatrt.bundle import Bundle
from coatrt.engines.runtime.load import load_decoder
from coatrt.engines.runtime.lora_file import load_lora
from coatrt.engines.runtime.options import RuntimeOptions
from coatrt.engines.runtime.ort import open_graph
from coatrt.engines.serving.rows import DecoderRows, OrtRows, RowsLora

FLOAT = np.dtype(np.float32)


@pytest.fixture(scope="module")
def parts(tiny_bundle: Path) -> Any:
    """Packed weights and products in int8, whose rounding depends on the kernel: the hardest case."""
    bundle = Bundle.open(tiny_bundle)
    graph, io = bundle.decoder("cpu")
    session, _ = open_graph(graph, io, bundle.contract, RuntimeOptions(threads=1, context=128, accuracy_level=4))
    own = RowsLora(bundle.contract, load_lora(bundle.path(bundle.manifest["lora"]), bundle.contract), FLOAT)
    base = RowsLora(bundle.contract, None, FLOAT)
    return bundle, session, io, own, base


def alone(parts: Any, prompt: list[int], steps: list[int], lora: RowsLora) -> list[Any]:
    """Return the logits after a prompt and after each further token, in rows that compute nothing else."""
    _, session, io, _, _ = parts
    rows = OrtRows(session, io, 2, 100)
    return [rows.extend(0, prompt, lora), *(rows.step({0: token}, lora)[0] for token in steps)]


def test_rows_in_company_equal_rows_alone(parts: Any) -> None:
    _, session, io, own, base = parts
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, size).tolist() for size in (1, 17, 40, 8, 33)]
    steps = rng.integers(0, 256, (5, 12)).tolist()
    loras = [own, own, base, own, base]
    expected = [alone(parts, *each) for each in zip(prompts, steps, loras, strict=True)]
    rows = OrtRows(session, io, 5, 100)
    found: list[list[Any]] = []
    for row, (prompt, lora) in enumerate(zip(prompts, loras, strict=True)):
        for begin in range(0, len(prompt), 7):  # in pieces, odd ones too, while others go on
            logits = rows.extend(row, prompt[begin : begin + 7], lora)
            if row and len(found[0]) <= 6:
                found[0].append(rows.step({0: steps[0][len(found[0]) - 1]}, own)[0])
        found.append([logits])
    for turn in range(12):
        for lora in (own, base):
            tokens = {r: steps[r][len(found[r]) - 1] for r in range(5) if loras[r] is lora and len(found[r]) <= 12}
            tokens = {row: token for row, token in tokens.items() if turn % 3 or row != 1}  # row 1 skips some turns
            for row, logits in (rows.step(tokens, lora) if tokens else {}).items():
                found[row].append(logits)
    for row in range(5):
        for a, b in zip(found[row], expected[row], strict=False):
            assert np.array_equal(a, b), (row, float(np.abs(a - b).max()))
    assert all(len(each) > 8 for each in found)


def test_a_copied_prefix_equals_a_computed_one(parts: Any) -> None:
    _, session, io, own, _ = parts
    prompt = list(b"the cat sat on the mat. the dog")
    rows = OrtRows(session, io, 4, 100)
    rows.extend(3, list(b"the cat sat on the mat. an owl and more"), own)
    assert rows.copy(3, 1, 24)
    assert np.array_equal(rows.extend(1, prompt[24:], own), alone(parts, prompt, [], own)[0])
    rows.lengths[3] = 24  # the rest is dropped
    assert np.array_equal(rows.extend(3, prompt[24:], own), alone(parts, prompt, [], own)[0])


def test_rows_equal_the_decoder(parts: Any) -> None:
    """The decoder computes one row at a time, with another kernel: equal but for rounding, at an exact level."""
    bundle, _, io, own, _ = parts
    graph, _ = bundle.decoder("cpu")
    session, _ = open_graph(graph, io, bundle.contract, RuntimeOptions(threads=1, context=64, accuracy_level=0))
    decoder = load_decoder(bundle, context=64, accuracy_level=0, threads=1)
    decoder.set_lora(own.tensors)
    rows = OrtRows(session, io, 3, 64)
    prompt = list(b"where is the cat")
    np.testing.assert_allclose(rows.extend(2, prompt, own), decoder.prefill([prompt])[0], atol=2e-4)
    for token in b"? on the mat":
        np.testing.assert_allclose(rows.step({2: token}, own)[2], decoder.decode([token])[0], atol=2e-4)


def test_a_full_row_stays_as_it_is_beside_others(parts: Any) -> None:
    _, session, io, own, _ = parts
    prompt = list(b"the cat sat on the mat.")
    rows = OrtRows(session, io, 2, len(prompt))
    rows.extend(0, prompt[:-1], own)
    kept = [cache[0, :, : len(prompt) - 1].copy() for cache in rows._caches]
    last = rows.extend(0, prompt[-1:], own)  # full now
    rows.extend(1, prompt[:4], own)
    for token in prompt[4:9]:
        rows.step({1: token}, own)  # row 0 runs beside it, for nothing
    assert all(np.array_equal(a, cache[0, :, : len(prompt) - 1]) for a, cache in zip(kept, rows._caches, strict=True))
    assert np.array_equal(last, alone(parts, prompt, [], own)[0])


def test_decoders_in_turns(parts: Any) -> None:
    bundle, _, _, own, base = parts
    rows = DecoderRows([load_decoder(bundle, context=64, accuracy_level=0) for _ in range(2)])  # type: ignore[misc]
    decoder = load_decoder(bundle, context=64, accuracy_level=0)
    for lora in (own, base):
        decoder.set_lora(lora.tensors)
        expected = [decoder.prefill([list(b"the cat")])[0], decoder.decode([32])[0]]
        rows.lengths[1] = 0
        found = [rows.extend(1, list(b"the cat"), lora), rows.step({1: 32}, lora)[1]]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert not rows.copy(0, 1, 3) and rows.capacity == 64
