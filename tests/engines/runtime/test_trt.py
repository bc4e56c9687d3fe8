"""The TensorRT decoder on fakes of TensorRT and the driver, which run the engine form of the graph on the CPU.

What it computes is compared with the cpu form, another graph with other operators, in another runtime class.
"""

import gc
import shutil
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coatrt.bundle import Bundle
from coatrt.engines.runtime import trt
from coatrt.engines.runtime.cuda_driver import CudaDriver
from coatrt.engines.runtime.decoder import LoraTensors
from coatrt.engines.runtime.emitter import Emitter
from coatrt.engines.runtime.generate import generate
from coatrt.engines.runtime.load import load_decoder
from coatrt.engines.runtime.options import RuntimeOptions
from coatrt.engines.runtime.ort import OrtDecoder
from coatrt.engines.runtime.packed_lora import PackedLora
from coatrt.engines.runtime.switch import SwitchingDecoder
from coatrt.engines.runtime.trt import TrtDecoder
from coatrt.engines.runtime.trt_engine import TrtEngine
from coatrt.errors import BuildError, ConfigError
from coatrt.system import notices
from support.fake_cuda import FakeDriver
from support.fake_tensorrt import VERSION, FakeContext, FakeTensorRT, add_engine

PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [9, 8, 100]]
COPY_IN, COPY_OUT, WAIT, LAUNCH = "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuStreamSynchronize", "cuGraphLaunch"


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return add_engine(tiny_bundle, tmp_path_factory.mktemp("trt") / "bundle")


@pytest.fixture(scope="module")
def lora(bundle: Bundle) -> LoraTensors:
    return Emitter.of(bundle, threads=1).emit(bundle.config)


class Machine:
    """A GPU and a TensorRT, both fakes."""

    def __init__(self, **facts: Any) -> None:
        self.driver = FakeDriver(**({"sm": 89} | facts))
        self.tensorrt = FakeTensorRT(self.driver)

    @property
    def decode(self) -> FakeContext:
        return self.tensorrt.contexts[0]

    @property
    def prefill(self) -> FakeContext:
        return self.tensorrt.contexts[1]

    def calls(self, act: Callable[[], Any]) -> dict[str, int]:
        """Return how often each call of the driver is made."""
        before = self.driver.calls.copy()
        act()
        return dict(self.driver.calls - before)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return install(Machine(), monkeypatch)


def install(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(trt, "open_driver", lambda: CudaDriver(machine.driver))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", machine.tensorrt)  # type: ignore[arg-type]
    notices.warn_once.cache_clear()
    return machine


def loaded(bundle: Bundle, batch: int = 2) -> TrtDecoder:
    made = load_decoder(bundle, RuntimeOptions(backend="trt", batch=batch))
    assert isinstance(made, TrtDecoder)
    return made


def reference(bundle: Bundle, batch: int = 2) -> OrtDecoder:
    made = load_decoder(bundle, RuntimeOptions(batch=batch, context=96, threads=1, accuracy_level=0))
    assert isinstance(made, OrtDecoder)
    return made


def assert_near(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    """The engine form computes in float16, the cpu form in float32."""
    assert found.dtype == np.float32
    assert np.abs(expected).max() > 1
    assert np.abs(found - expected).max() <= 5e-3 * np.abs(expected).max()


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
    from coatrt.engines.runtime.packed_lora import LoraLayout

    decoder, layout = loaded(bundle), LoraLayout(bundle.contract, np.dtype("bfloat16"))
    buffer = np.zeros(layout.nbytes, np.uint8)
    layout.fill(buffer, lora)
    decoder.set_lora(lora)
    expected = decoder.prefill(PROMPTS)
    decoder.set_lora(PackedLora(buffer, layout, bundle.manifest["configuration"]["hash"]))
    found = decoder.prefill(PROMPTS)
    assert 0 < np.abs(found - expected).max() <= 2e-2 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        ({"capturable": False}, "TensorRT finds that it cannot be"),
        ({"refuses_capture": True}, "operation not permitted when stream is capturing"),
        ("cuStreamBeginCapture_v2", "cuStreamBeginCapture_v2: error 801"),
        ("cuStreamEndCapture", "cuStreamEndCapture: error 801"),
        ("cuGraphInstantiateWithFlags", "cuGraphInstantiateWithFlags: error 801"),
    ],
)
def test_a_step_that_is_not_captured_runs_plainly_and_says_so_once(
    machine: Machine,
    bundle: Bundle,
    lora: LoraTensors,
    capsys: pytest.CaptureFixture[str],
    failure: Any,
    said: str,
) -> None:
    decoder, other = loaded(bundle), reference(bundle)
    if isinstance(failure, str):
        machine.driver.fails[failure] = 801
    else:
        vars(machine.tensorrt).update(failure)
    for each in (decoder, other):
        each.set_lora(lora)
    for _ in range(2):
        assert_near(decoder.prefill(PROMPTS), other.prefill(PROMPTS))
        for tokens in ([5, 6], [7, 8], [9, 10]):
            assert_near(decoder.decode(tokens), other.decode(tokens))
    line = f"coatrt: a decode step of the engine is not captured as a CUDA graph, and is slower ({said})\n"
    assert capsys.readouterr().err == line
    assert (machine.driver.calls[LAUNCH], machine.driver.graphs) == (0, {})
    tried = {"cuStreamBeginCapture_v2", "cuStreamEndCapture"} & set(machine.driver.calls)
    assert all(machine.driver.calls[name] == 1 for name in tried)


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
    with pytest.raises(ConfigError, match="97 positions are needed and the decoder has 96, as many as the bundle was"):
        decoder.decode([1, 1])
    for token in (3, 4):
        assert_near(decoder.decode([None, token])[1:], other.decode([None, token])[1:])
    assert decoder.lengths.tolist() == [96, 5]
    with pytest.raises(ConfigError, match="1 sequences are given to a decoder of batch 2"):
        decoder.prefill([[1]])
    with pytest.raises(ConfigError, match="97 positions are needed and the decoder has 96"):
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
    for held in (1, 2):
        session = SwitchingDecoder(bundles, RuntimeOptions(backend="trt", batch=2), held=held)
        session.prefill(PROMPTS)
        session.decode([3, 4])
        straight = session.decode([5, 6])
        session.prefill(PROMPTS)
        session.decode([3, 4])
        switched = session.switch("b")
        assert (switched.kept, switched.load_seconds > 0) == (True, True)
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


@pytest.mark.parametrize(
    ("facts", "batch", "said"),
    [
        ({"start": 100}, 1, "no NVIDIA GPU here; run the bundle with --backend ort"),
        ({"gpus": 0}, 1, "no NVIDIA GPU here; run the bundle with --backend ort"),
        ({"start": 803}, 1, r"the NVIDIA driver does not start \(error 803\)"),
        ({"sm": 120}, 1, "the bundle has engines for SM89, this GPU is SM120; build one for it"),
        ({}, 3, "the engine takes a batch of 2, 3 is given; build with --batch"),
        (
            {"free": 1 << 20},
            1,
            r"not enough memory on the GPU: 0\.27 GB are needed .* give a smaller batch, or build the bundle with a",
        ),
    ],
)
def test_a_machine_that_cannot_run_it_is_refused_in_one_line(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any], batch: int, said: str
) -> None:
    install(Machine(**facts), monkeypatch)
    with pytest.raises(BuildError, match=said) as error:
        loaded(bundle, batch)
    assert "\n" not in str(error.value)


def test_another_tensorrt_or_none_is_refused_with_both_values(
    machine: Machine, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", types.SimpleNamespace(__version__="1.0"))  # type: ignore[arg-type]
    with pytest.raises(BuildError, match=rf"needs tensorrt-rtx {VERSION}, here is 1\.0; engines do not load across"):
        loaded(bundle)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)  # type: ignore[arg-type]
    with pytest.raises(BuildError, match=r"needs tensorrt-rtx \(.*tensorrt_rtx.*\); install it, or use --backend ort"):
        loaded(bundle)


def test_what_tensorrt_says_is_in_the_line(
    machine: Machine, bundle: Bundle, tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BuildError, match=r"does not load \(magicTag == kEXPECTED_MAGIC_TAG failed\): another TensorRT"):
        loaded(add_engine(tiny_bundle, tmp_path / "b", plan=b"not an engine"))
    machine.tensorrt.no_context = True
    with pytest.raises(BuildError, match=r"TensorRT makes no context \(no reason is given\); free memory"):
        loaded(bundle)
    machine.tensorrt.no_context = False
    decoder = loaded(bundle)
    machine.tensorrt.fails = True
    with pytest.raises(BuildError, match=r"fails in a step of 4 tokens \(the first reason\); give a smaller batch"):
        decoder.prefill(PROMPTS)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("change", [{"kv_heads": 4}, {"vocabulary": 300}, {"layers": 3}, {"activations": "float32"}])
def test_an_engine_that_is_not_the_manifests_is_refused(
    machine: Machine, bundle: Bundle, change: dict[str, Any]
) -> None:
    io, driver = bundle.decoder("engine")[1], CudaDriver(machine.driver)
    plan = bundle.path("sm.engine").read_bytes()
    with pytest.raises(BuildError, match=r"the engine and the manifest differ in \S+; build the bundle again"):
        TrtDecoder(machine.tensorrt, plan, replace(io, **change), bundle.contract, 2, 4, driver)


def test_the_real_library_refuses_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    tensorrt = pytest.importorskip("tensorrt_rtx")
    with pytest.raises(BuildError, match=r"the engine does not load \(.*Serialization.*\): another TensorRT"):
        TrtEngine(tensorrt, b"no engine" * 100)
    assert capfd.readouterr() == ("", "")
    for name in ("get_tensor_name", "get_tensor_shape", "get_tensor_dtype", "num_io_tensors", "device_memory_size_v2"):
        assert hasattr(tensorrt.ICudaEngine, name)
    for name in ("set_device_memory", "set_tensor_address", "set_input_shape", "execute_async_v3"):
        assert hasattr(tensorrt.IExecutionContext, name)
    assert tuple(tensorrt.Dims([1, -1])) == (1, -1)
    assert {"FLOAT", "HALF", "BF16", "INT64"} <= set(dir(tensorrt.DataType))
    assert hasattr(tensorrt.ExecutionContextAllocationStrategy, "USER_MANAGED")
    assert hasattr(tensorrt.DynamicShapesKernelSpecializationStrategy, "EAGER")


def test_a_missing_engine_file_or_an_altered_one_is_not_read(machine: Machine, bundle: Bundle, tmp_path: Path) -> None:
    from coatrt.errors import BundleError

    place = Path(shutil.copytree(bundle.directory, tmp_path / "b"))
    (place / "sm.engine").write_bytes(b"another engine!.onnx")
    with pytest.raises(BundleError, match=r"sm\.engine"):
        loaded(Bundle.open(place))
