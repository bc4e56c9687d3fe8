"""The TensorRT decoder on fakes of TensorRT and the driver, which run the engine form of the graph on the CPU.

What it computes is compared with the cpu form, another graph with other operators, in another runtime class.
"""

import gc
from pathlib import Path

import numpy as np
import pytest

from coatrt.bundle import Bundle
from coatrt.engines.runtime.cuda_driver import CudaDriver
from coatrt.engines.runtime.decoder import LoraTensors
from coatrt.engines.runtime.generate import generate
from coatrt.engines.runtime.options import RuntimeOptions
from coatrt.engines.runtime.packed_lora import LoraLayout, PackedLora
from coatrt.engines.runtime.switch import SwitchingDecoder
from coatrt.engines.runtime.trt import TrtDecoder
from coatrt.errors import ConfigError
from support.fake_tensorrt import FakeTensorRT, add_engine
from support.trt_machine import (
    COPY_IN,
    COPY_OUT,
    LAUNCH,
    PROMPTS,
    WAIT,
    Machine,
    assert_near,
    loaded,
    reference,
)


def test_logits_equal_the_cpu_form_in_pieces_unequal_and_replayed(
    machine: Machine, bundle: Bundle, lora: LoraTensors
) -> None:
    decoder, other = loaded(bundle), reference(bundle)
    for each in (decoder, other):
        each.set_lora(lora)
    for _ in range(2):  # the second time the graph of the first is there, and prefills run between its replays
        assert_near(decoder.prefill(PROMPTS), other.prefill(PROMPTS))
        for tokens in ([5, 6], [None, 7], [8, 9], [10, None]):
            assert_near(decoder.decode(tokens), other.decode(tokens))
        assert decoder.lengths.tolist() == other.lengths.tolist() == [12, 6]
    assert machine.driver.calls["cuGraphInstantiateWithFlags"] == 1
    assert machine.driver.calls[LAUNCH] == 9  # 8 tokens, and twice the last piece of 9; the first of these ran plainly
    assert (machine.decode.runs, machine.prefill.runs) == (2, 4)  # plain and captured; two whole pieces, twice


def test_a_decode_step_is_one_copy_in_one_launch_one_copy_out_and_one_wait(machine: Machine, bundle: Bundle) -> None:
    decoder = loaded(bundle)
    decoder.prefill(PROMPTS)
    first = machine.calls(lambda: decoder.decode([3, 4]))
    assert (first[COPY_IN], first[COPY_OUT], first[WAIT], LAUNCH in first) == (1, 1, 1, True)
    step = {"cuCtxSetCurrent": 1, COPY_IN: 1, LAUNCH: 1, COPY_OUT: 1, WAIT: 1}
    for _ in range(3):
        assert machine.calls(lambda: decoder.decode([3, 4])) == step
    decoder.prefill([[1, 2], [3]])
    assert machine.calls(lambda: decoder.decode([3, 4])) == step
    piece = {"cuCtxSetCurrent": 1, COPY_IN: 1, COPY_OUT: 1, WAIT: 1}
    assert machine.calls(lambda: decoder.prefill([[1, 2, 3], [4]])) == piece


def test_addresses_are_fixed_caches_in_place_and_shapes_set_only_where_they_change(
    machine: Machine, bundle: Bundle
) -> None:
    decoder = loaded(bundle)
    io, contexts = decoder.io, machine.tensorrt.contexts
    before = [dict(context.addresses) for context in contexts]
    assert [context.eager for context in contexts] == [True, False]  # replayed kernels are those of the shape
    assert contexts[0].memory == contexts[1].memory  # of activations, which are never those of both
    for addresses, context in zip(before, contexts, strict=True):
        assert all(address % 256 == 0 for address in addresses.values())
        for past, present in zip(io.past_names, io.present_names, strict=True):
            assert addresses[past] == addresses[present]
            assert context.shapes[past] == (2, io.kv_heads, 96, io.head_dim)
        distinct = {address for name, address in addresses.items() if name not in io.present_names}
        assert len(distinct) == len(addresses) - len(io.present_names)
    shaped = machine.prefill.shaped
    decoder.prefill([[1, 2, 3, 4] * 3, [1]])  # the profile's whole piece, for which it was bound
    assert machine.prefill.shaped == shaped
    decoder.prefill([[1, 2, 3, 4, 5, 6], [1]])
    assert machine.prefill.shaped == shaped + 2  # input_ids and position_ids of the last two tokens
    for _ in range(4):
        decoder.decode([3, 3])
    assert machine.prefill.shaped == shaped + 2
    assert machine.decode.shapes["input_ids"] == (2, 1)
    assert [context.addresses for context in contexts] == before


def test_greedy_tokens_are_those_of_the_cpu_form(machine: Machine, bundle: Bundle, lora: LoraTensors) -> None:
    made = []
    for decoder in (loaded(bundle), reference(bundle)):
        decoder.set_lora(lora)
        made.append([result.tokens for result in generate(decoder, PROMPTS, max_tokens=12)])
    assert made[0] == made[1]
    assert machine.driver.calls[LAUNCH] >= 9


def test_a_lora_is_one_copy_and_seen_by_the_replay(machine: Machine, bundle: Bundle, lora: LoraTensors) -> None:
    decoder, other = loaded(bundle), reference(bundle)
    rng = np.random.default_rng(0)
    second = {name: rng.standard_normal(value.shape).astype(np.float32) * 0.1 for name, value in lora.items()}
    packed = [decoder.packed(lora), decoder.packed(second)]
    assert all(isinstance(each, PackedLora) for each in packed)
    decoder.prefill(PROMPTS)
    decoder.decode([1, 2])
    plain = decoder.prefill(PROMPTS), decoder.decode([3, 4])
    seen = [plain[1]]
    for tensors, plainly in ((packed[0], lora), (packed[1], second), (lora, lora)):
        calls = machine.calls(lambda tensors=tensors: decoder.set_lora(tensors))
        assert (calls[COPY_IN], calls[WAIT]) == (1, 1)
        other.set_lora(plainly)
        assert_near(decoder.prefill(PROMPTS), other.prefill(PROMPTS))
        seen.append(decoder.decode([3, 4]))
        assert_near(seen[-1], other.decode([3, 4]))
    assert np.array_equal(seen[1], seen[3])
    assert all(np.abs(seen[a] - seen[b]).max() > 0.05 for a, b in ((0, 1), (0, 2), (1, 2)))
    decoder.set_lora(None)
    assert np.array_equal(decoder.prefill(PROMPTS), plain[0])
    assert np.array_equal(decoder.decode([3, 4]), plain[1])
    assert machine.driver.calls["cuGraphInstantiateWithFlags"] == 1
    with pytest.raises(ConfigError, match="differ in"):
        decoder.set_lora({})


def test_a_lora_packed_in_another_dtype_is_cast_and_not_copied(
    machine: Machine, bundle: Bundle, lora: LoraTensors
) -> None:
    decoder, layout = loaded(bundle), LoraLayout(bundle.contract, np.dtype("bfloat16"))
    buffer = np.zeros(layout.nbytes, np.uint8)
    layout.fill(buffer, lora)
    decoder.set_lora(lora)
    expected = decoder.prefill(PROMPTS)
    decoder.set_lora(PackedLora(buffer, layout, bundle.manifest["configuration"]["hash"]))
    found = decoder.prefill(PROMPTS)
    assert 0 < np.abs(found - expected).max() <= 2e-2 * np.abs(expected).max()


def test_replay_can_be_left_out(machine: Machine, bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    plain, replayed = (TrtDecoder.of(bundle, RuntimeOptions(batch=2), replay=replay) for replay in (False, True))
    for decoder in (plain, replayed):
        decoder.prefill(PROMPTS)
    for tokens in ([5, 6], [7, 8], [9, 10]):
        assert np.array_equal(plain.decode(tokens), replayed.decode(tokens))
    assert machine.driver.calls[LAUNCH] == 3  # the last piece of the longer prompt is a step of one token too
    assert machine.driver.calls["cuStreamBeginCapture_v2"] == 1
    assert capsys.readouterr().err == ""


def test_what_was_reserved_is_given_back(machine: Machine, bundle: Bundle) -> None:
    decoder = loaded(bundle)
    decoder.prefill(PROMPTS)
    decoder.decode([1, 2])
    assert len(machine.driver.graphs) == 1
    assert len(machine.driver.buffers) == len(decoder.io.past_names) + 6  # LoRA, activations; inputs, logits, twice
    machine.tensorrt.contexts.clear()
    del decoder
    gc.collect()
    assert (machine.driver.graphs, machine.driver.buffers) == ({}, {})


def test_a_full_cache_is_refused_and_a_full_sequence_rests(machine: Machine, bundle: Bundle, lora: LoraTensors) -> None:
    decoder, other = loaded(bundle), reference(bundle)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 250, 96).tolist(), [9, 8, 100]]
    for each in (decoder, other):
        each.set_lora(lora)
    assert_near(decoder.prefill(prompts), other.prefill(prompts))
    with pytest.raises(
        ConfigError, match="97 positions needed, the decoder has 96: the bundle was built for that context"
    ):
        decoder.decode([1, 1])
    for token in (3, 4):
        assert_near(decoder.decode([None, token])[1:], other.decode([None, token])[1:])
    assert decoder.lengths.tolist() == [96, 5]
    with pytest.raises(ConfigError, match="got 1 sequences for a decoder of batch 2"):
        decoder.prefill([[1]])
    with pytest.raises(ConfigError, match="97 positions needed, the decoder has 96"):
        decoder.prefill([[1] * 97, [1]])


def test_sequences_move_from_and_to_the_cpu_form(machine: Machine, bundle: Bundle, lora: LoraTensors) -> None:
    """The cpu form's caches are ONNX Runtime's, those of the engine form TensorScatter's: both rotated alike."""
    made = (loaded(bundle), reference(bundle))
    for decoder in made:
        decoder.set_lora(lora)
    made[0].prefill([[1], [2]])
    made[0].decode([1, 2])  # captures
    for here, there in (made, made[::-1]):
        here.prefill(PROMPTS)
        here.decode([1, 2])
        there.restore(here.state())
        assert there.lengths.tolist() == [10, 4]
        for tokens in ([3, 4], [5, 6]):
            assert_near(there.decode(tokens), here.decode(tokens))
    with pytest.raises(ConfigError, match="belong to another model or batch"):
        made[0].restore(reference(bundle, batch=1).state())


def test_a_running_session_switches_engines_and_goes_on(
    machine: Machine, bundle: Bundle, tiny_bundle: Path, tmp_path: Path
) -> None:
    bundles = {"a": bundle, "b": add_engine(tiny_bundle, tmp_path / "b")}
    for cache_size in (1, 2):
        session = SwitchingDecoder(bundles, RuntimeOptions(backend="trt", batch=2), cache_size=cache_size)
        session.prefill(PROMPTS)
        session.decode([3, 4])
        straight = session.decode([5, 6])
        session.prefill(PROMPTS)
        session.decode([3, 4])
        switched = session.switch("b")
        assert (switched.continues, switched.load_seconds > 0) == (True, True)
        assert session.lengths.tolist() == [10, 4]
        assert np.array_equal(session.decode([5, 6]), straight)


def test_regular_tensorrt_has_no_runtime_config(machine: Machine, bundle: Bundle, lora: LoraTensors) -> None:
    regular = FakeTensorRT(machine.driver, rtx=False)
    plan = bundle.path("sm.engine").read_bytes()
    decoder = TrtDecoder(regular, plan, bundle.decoder("engine")[1], bundle.contract, 2, 4, CudaDriver(machine.driver))
    other = reference(bundle)
    for each in (decoder, other):
        each.set_lora(lora)
    assert_near(decoder.prefill(PROMPTS), other.prefill(PROMPTS))
    for tokens in ([5, 6], [7, 8]):
        assert_near(decoder.decode(tokens), other.decode(tokens))
    assert [context.eager for context in regular.contexts] == [False, False]
