"""The decoder of the cuda form on ONNX Runtime's CPU provider: every format, batches, LoRA, moved sequences."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coatrt.adapter.adapter import Adapter
from coatrt.bundle import Bundle
from coatrt.configs.config import QuantConfig
from coatrt.configs.lora_contract import DecoderIO, contract_for
from coatrt.engines.runtime import cuda, cuda_driver, cuda_session
from coatrt.engines.runtime.cuda import CudaDecoder
from coatrt.engines.runtime.cuda_driver import CudaDriver, DeviceMemory
from coatrt.engines.runtime.cuda_memory import check_memory, device_weights
from coatrt.engines.runtime.decoder import Decoder
from coatrt.engines.runtime.load import load_decoder
from coatrt.engines.runtime.lora_file import Lora, load_lora
from coatrt.engines.runtime.options import RuntimeOptions
from coatrt.engines.runtime.packed_lora import PackedLora
from coatrt.engines.runtime.switch import SwitchingDecoder
from coatrt.errors import BuildError, ConfigError
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.export.decoder import GraphForm, decoder_io, export_decoder
from coatrt.models.checkpoint import Checkpoint
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.weight_format import WeightFormat
from support.fake_cuda import FakeDriver
from support.tiny import save_tiny_llama

FORM = GraphForm("cuda", "cuda.onnx", "float16")
PROMPTS = [[5, 77, 130, 9, 41, 200, 13], [8, 8, 120]]
STEPS = 16
FORMATS = ("fp16", "bf16", "int8", "int8-g32", "int4-g32", "int4-g64", "int4-g128", "fp8", "nvfp4", "nf2-g16",
           "nf2-g64-dq4-bf16-256", "nf3-g32", "nf4-g32-dq8-fp16-64", "nf8-g64")  # fmt: skip


@pytest.fixture(scope="module")
def adapter(tiny_adapter: Path) -> Adapter:
    return Adapter.from_pretrained(tiny_adapter)


def decoder_of(
    adapter: Adapter, config: QuantConfig, directory: Path, batch: int = 1, lora: bool = True
) -> CudaDecoder:
    directory.mkdir(exist_ok=True)
    checkpoint, contract = adapter.checkpoint(), adapter.description.contract if lora else None
    export_decoder(checkpoint, config, directory, forms=[FORM], contract=contract)
    options = RuntimeOptions(batch=batch, context=64)
    return CudaDecoder(directory / "cuda.onnx", decoder_io(checkpoint, FORM), contract, options, provider="cpu")


def lora_of(adapter: Adapter) -> dict[str, Any]:
    emitted = adapter.emit(adapter.description.space.uniform("int8"))
    return {name: tensor.numpy() for name, tensor in emitted.items()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> FakeQuantModel:
    """A model as wide as its float16 sums are close to those of a trained one."""
    directory = save_tiny_llama(tmp_path_factory.mktemp("mild"), initializer_range=0.03, hidden_size=128)
    checkpoint = Checkpoint.open(directory)
    return FakeQuantModel(checkpoint, CodeStore(checkpoint))


def random_map(checkpoint: Checkpoint, seed: int) -> QuantConfig:
    """Return a format drawn for every matrix: those that read one input differ too, and are no one weight then."""
    model, rng = checkpoint.matrices, np.random.default_rng(seed)
    return QuantConfig({name: WeightFormat.parse(str(rng.choice(FORMATS))) for name in model.names})


@pytest.mark.parametrize("which", [*FORMATS, *range(5)])
def test_logits_equal_torch_with_the_lora(reference: FakeQuantModel, tmp_path: Path, which: str | int) -> None:
    checkpoint, contract = reference.checkpoint, contract_for(reference.checkpoint.matrices, 16, 32)
    uniform = isinstance(which, str)
    config = QuantConfig.uniform(checkpoint.matrices, which) if uniform else random_map(checkpoint, which)
    rng = np.random.default_rng(1)
    lora = {name: (rng.standard_normal(shape) * 0.05).astype(np.float32) for name, shape in contract.shapes.items()}
    export_decoder(checkpoint, config, tmp_path, forms=[FORM], contract=contract)
    options = RuntimeOptions(batch=2, context=64)
    decoder = CudaDecoder(tmp_path / "cuda.onnx", decoder_io(checkpoint, FORM), contract, options, provider="cpu")
    decoder.set_lora(lora)
    tokens = rng.integers(0, 250, (STEPS, 2)).tolist()
    found = np.stack([decoder.prefill(PROMPTS), *(decoder.decode(row) for row in tokens)], axis=1)
    reference.set_config(config)
    reference.set_lora(contract, {name: torch.from_numpy(value) for name, value in lora.items()})
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([[*prompt, *(step[row] for step in tokens)]])
        with torch.no_grad():
            expected = reference.logits(ids)[0, len(prompt) - 1 :].numpy()
        assert np.abs(found[row] - expected).max() <= 2e-3 * np.abs(expected).max()


def test_zeros_equal_the_base_and_a_packed_lora_the_plain_one(adapter: Adapter, tmp_path: Path) -> None:
    config, lora = adapter.description.space.uniform("int4-g32"), lora_of(adapter)
    decoder = decoder_of(adapter, config, tmp_path / "with")
    base = decoder_of(adapter, config, tmp_path / "without", lora=False)
    plain = base.prefill(PROMPTS[:1])
    assert np.array_equal(decoder.prefill(PROMPTS[:1]), plain)
    decoder.set_lora(lora)
    adapted = decoder.prefill(PROMPTS[:1])
    assert np.abs(adapted - plain).max() > 1e-2
    packed = decoder.packed(Lora(lora, "abc"))
    assert isinstance(packed, PackedLora)
    assert packed.configuration == "abc"
    assert all(value.dtype == np.float16 for value in packed.values())
    decoder.set_lora(None)
    assert np.array_equal(decoder.prefill(PROMPTS[:1]), plain)
    decoder.set_lora(packed)
    assert np.array_equal(decoder.prefill(PROMPTS[:1]), adapted)
    for wrong, said in (({}, "differ in"), ({**lora, "more": lora[next(iter(lora))]}, "differ in more")):
        with pytest.raises(ConfigError, match=said):
            decoder.set_lora(wrong)
        with pytest.raises(ConfigError, match=said):
            decoder.packed(wrong)


def test_a_sequence_that_rests_goes_on_as_if_alone(adapter: Adapter, tmp_path: Path) -> None:
    config = adapter.description.space.uniform("fp8")
    two, one = (decoder_of(adapter, config, tmp_path / name, batch) for name, batch in (("two", 2), ("one", 1)))
    two.prefill(PROMPTS)
    for token in (3, 4, 5):
        two.decode([token, None])
    together = [two.decode([6, token])[1] for token in (9, 10)]
    assert two.lengths.tolist() == [12, 5]
    one.prefill(PROMPTS[1:])
    for token, found in zip((9, 10), together, strict=True):
        np.testing.assert_allclose(found, one.decode([token])[0], atol=2e-3 * np.abs(found).max())
    with pytest.raises(ConfigError, match="cannot append 3 tokens at once to a batch of 2"):
        two.run(np.ones((2, 3), np.int64), np.array([0, 4]), np.zeros((2, 1), np.int64))
    with pytest.raises(ConfigError, match="65 positions needed, the decoder has 64"):
        one.prefill([[1] * 65])


def test_buffers_stay_where_they_are_and_only_new_slots_are_written(adapter: Adapter, tmp_path: Path) -> None:
    decoder = decoder_of(adapter, adapter.description.space.uniform("fp16"), tmp_path / "g", batch=2)
    before = [*decoder._caches, decoder._lora, decoder._steps.address, decoder._logits]
    decoder.prefill(PROMPTS)
    _, first = decoder.state()
    decoder.decode([1, 2])
    assert [*decoder._caches, decoder._lora, decoder._steps.address, decoder._logits] == before
    assert all(address % 256 == 0 for address in before)
    lengths, second = decoder.state()
    assert lengths.tolist() == [8, 4]
    for row, length in enumerate((7, 3)):
        assert np.array_equal(first[0][row, :, :length], second[0][row, :, :length])
        assert np.abs(second[0][row, :, length]).max() > 0


def on_the_cpu(bundle: Bundle, options: RuntimeOptions, **_: Any) -> Decoder:
    made = (
        CudaDecoder.of(bundle, options, provider="cpu") if options.backend == "cuda" else load_decoder(bundle, options)
    )
    made.configuration = bundle.manifest["configuration"]["hash"]
    return made


def test_sequences_move_between_both_decoders_of_onnx_runtime(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    lora = load_lora(bundle.path("lora.safetensors"), bundle.contract)
    made = [
        on_the_cpu(bundle, RuntimeOptions(backend=name, batch=2, context=64, accuracy_level=0))
        for name in ("cuda", "ort")
    ]
    for decoder in made:
        decoder.set_lora(lora)
    for here, there in (made, made[::-1]):
        here.prefill(PROMPTS)
        here.decode([1, 2])
        there.restore(here.state())
        assert there.lengths.tolist() == [8, 4]
        expected, found = here.decode([3, 4]), there.decode([3, 4])
        np.testing.assert_allclose(found, expected, atol=3e-3 * np.abs(expected).max())
    small = on_the_cpu(bundle, RuntimeOptions(backend="cuda", batch=2, context=8))
    with pytest.raises(ConfigError, match="have 9 positions, the decoder has 8"):
        small.restore(made[0].state())


def test_a_running_session_switches_bundles(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coatrt.engines.runtime.switch.load_decoder", on_the_cpu)
    bundle = Bundle.open(tiny_bundle)
    session = SwitchingDecoder({"a": bundle, "b": bundle}, RuntimeOptions(backend="cuda", context=64))
    session.prefill([PROMPTS[0]])
    first = session.decode([3])
    session.prefill([PROMPTS[0]])
    assert session.switch("b").continues
    np.testing.assert_array_equal(session.decode([3]), first)


def test_device_memory_is_copied_to_and_from_and_given_back() -> None:
    fake = FakeDriver()
    driver = CudaDriver(fake)
    memory = DeviceMemory(driver)
    address = memory.allocate(64)
    data, back = np.arange(16, dtype=np.float32), np.ones(16, np.float32)
    memory.read(address, back)
    memory.synchronize()
    assert not back.any()
    memory.write(address, data)
    memory.read(address, back)
    memory.synchronize()
    assert np.array_equal(back, data)
    host = memory.host(32)
    host[...] = 5
    view = host.view(np.int64)
    assert (host.nbytes, memory.stream, len(fake.buffers)) == (32, 11, 2)
    del host
    gc.collect()
    assert view[0] == 0x0505050505050505  # as long as anything looks into it
    del view, memory
    gc.collect()
    assert fake.buffers == {}
    assert DeviceMemory(driver).stream == 11


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"start": 100}, "no NVIDIA GPU here; run the bundle with --backend ort"),
        ({"gpus": 0}, "no NVIDIA GPU here"),
        ({"start": 803}, r"the NVIDIA driver does not start \(error 803\); reinstall it"),
        ({"sm": 100}, "this GPU is SM100, onnxruntime-gpu has code for SM75, SM80, SM86, SM89, SM90, SM120"),
        ({"sm": 70}, "this GPU is SM70"),
        ({"free": 1 << 20}, r"not enough GPU memory: 5\.45 GB needed \(3\.00 GB of weights, 2\.00 GB of"),
    ],
)
def test_a_machine_that_cannot_run_it_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(cuda_session.ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(cuda, "open_driver", lambda: CudaDriver(FakeDriver(**facts)))
    io = DecoderIO(10, 4, 125, 46000000, None, "float16", 100000)
    with pytest.raises(BuildError, match=said) as error:
        CudaDecoder(Path("no.onnx"), io, None, RuntimeOptions(context=100000), weight_bytes=3 * 10**9)
    assert "\n" not in str(error.value)


def test_an_onnx_runtime_without_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_session.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BuildError, match=r"is built without CUDA; install onnxruntime-gpu in its place"):
        cuda_session.check_provider(CudaDriver(FakeDriver()))


def test_machine_code_serves_its_own_and_later_minor_versions() -> None:
    assert [sm for sm in (70, 75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121) if cuda_session.supports(sm)] == [
        75, 80, 86, 87, 89, 90, 120, 121
    ]  # fmt: skip


def test_a_missing_driver_is_one_line(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "_LIBRARY", "libcuda-that-is-not-there.so")
    cuda_driver.open_driver.cache_clear()
    with pytest.raises(BuildError, match=r"no NVIDIA driver here \(libcuda-that-is-not-there\.so is missing\)"):
        load_decoder(Bundle.open(tiny_bundle), RuntimeOptions(backend="cuda"))
    cuda_driver.open_driver.cache_clear()


def test_memory_and_the_line_on_decoded_weights_follow_from_the_formats(adapter: Adapter) -> None:
    space, model = adapter.description.space, adapter.description.model
    assert device_weights(space.uniform("int4-g32"), model).note == ""
    plain = device_weights(space.uniform("fp16"), model)
    assert (plain.note, plain.nbytes) == (
        "",
        2 * (model.parameters + model.matrices[0].N * model.matrices[0].K) + model.other_bytes,
    )
    found = device_weights(space.uniform("nvfp4"), model)
    assert f"{len(model.matrices)} matrices ({len(model.matrices)} nvfp4) are decoded to float16" in found.note
    assert 2 * model.parameters < found.nbytes < plain.nbytes
    check_memory(CudaDriver(FakeDriver()), found.nbytes, 1, 1, 1, 1, "")
