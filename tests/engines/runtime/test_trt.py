"""The TensorRT decoder through a fake of the library: fixed addresses, in-place caches, prompts in pieces."""

import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coatrt.bundle import Bundle
from coatrt.configs.lora_contract import DecoderIO
from coatrt.devices.profiles import device_profile
from coatrt.engines.runtime import trt
from coatrt.engines.runtime.load import load_decoder
from coatrt.engines.runtime.options import RuntimeOptions
from coatrt.engines.runtime.ort import OrtDecoder
from coatrt.engines.runtime.trt import TrtDecoder
from coatrt.errors import BuildError, ConfigError

MEMORY: dict[int, bytearray] = {}


class _Array:
    def __init__(self, shape: tuple[int], dtype: Any) -> None:
        self.ptr = 1000 + len(MEMORY)
        MEMORY[self.ptr] = bytearray(shape[0])

    def copy_from(self, data: np.ndarray[Any, Any], stream: Any) -> None:
        assert data.dtype == np.uint8
        MEMORY[self.ptr][: data.size] = data.tobytes()

    def copy_to(self, out: np.ndarray[Any, Any], stream: Any) -> None:
        out[:] = np.frombuffer(MEMORY[self.ptr], np.uint8)[: out.size]


class _Stream:
    ptr = 7

    def synchronize(self) -> None:
        pass


class _Context:
    """Runs the cpu form of the same bundle where TensorRT would run the engine."""

    def __init__(self, decoder: OrtDecoder) -> None:
        self.decoder = decoder
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.history: list[dict[str, int]] = []

    def set_tensor_address(self, name: str, pointer: int) -> None:
        self.addresses[name] = pointer

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self.shapes[name] = tuple(shape)

    def _read(self, name: str, dtype: Any, shape: tuple[int, ...]) -> Any:
        count = int(np.prod(shape))
        return np.frombuffer(MEMORY[self.addresses[name]], dtype, count).reshape(shape).copy()

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7
        io, contract = self.decoder.io, self.decoder.contract
        assert contract is not None
        self.history.append(dict(self.addresses))
        self.decoder.set_lora({n: self._read(n, np.float16, s).astype(np.float32) for n, s in contract.shapes.items()})
        ids, position, start, index = (
            self._read(n, np.int64, self.shapes[n])
            for n in ("input_ids", "position_ids", "write_index", "logits_index")
        )
        assert ids.shape[1] <= 4
        assert np.array_equal(position, np.minimum(start[:, None] + np.arange(ids.shape[1]), io.max_positions - 1))
        # Column by column: ONNX Runtime's attention takes pieces of a prompt of one sequence only.
        columns = [self.decoder.run(ids[:, j : j + 1], start + j, 0 * index) for j in range(ids.shape[1])]
        logits = np.concatenate(columns, 1)[np.arange(len(ids)), index[:, 0]].astype(np.float16)
        MEMORY[self.addresses["logits"]][:] = logits.tobytes()
        return True


@pytest.fixture
def decoder(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> TrtDecoder:
    bundle = Bundle.open(tiny_bundle)
    _, io = bundle.decoder("engine")
    reference = load_decoder(bundle, RuntimeOptions(batch=2, context=96, threads=1, accuracy_level=0))
    assert isinstance(reference, OrtDecoder)
    context = _Context(reference)
    fake = types.SimpleNamespace(
        Logger=type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None}),
        Runtime=lambda logger: types.SimpleNamespace(
            deserialize_cuda_engine=lambda plan: (
                types.SimpleNamespace(create_execution_context=lambda: context) if plan == b"engine" else None
            )
        ),
    )
    package = types.ModuleType("polygraphy")
    package.cuda = types.SimpleNamespace(DeviceArray=_Array, Stream=_Stream)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "polygraphy", package)
    made = TrtDecoder(fake, b"engine", io, bundle.contract, batch=2, prefill=4)
    with pytest.raises(BuildError, match="does not load"):
        TrtDecoder(fake, b"other", io, bundle.contract, batch=2, prefill=4)
    made._context = context  # the one that `engine` made
    return made


def test_addresses_are_fixed_and_caches_in_place(decoder: TrtDecoder) -> None:
    context: Any = decoder._context
    prompts = [[1, 2, 3, 4, 5, 6, 7], [9, 8]]
    decoder.prefill(prompts)
    decoder.decode([3, 3])
    io: DecoderIO = decoder.io
    assert len(context.history) == 3  # two pieces of the prompt, one token
    assert all(addresses == context.history[0] for addresses in context.history)
    for past, present in zip(io.past_names, io.present_names, strict=True):
        assert context.addresses[past] == context.addresses[present]
        assert context.shapes[past] == (2, io.kv_heads, 96, io.head_dim)
    assert decoder.lengths.tolist() == [8, 3]


def test_pieces_of_a_prompt_give_the_logits_of_the_whole(decoder: TrtDecoder, tiny_bundle: Path) -> None:
    from coatrt.engines.runtime.emitter import Emitter

    bundle = Bundle.open(tiny_bundle)
    lora = Emitter.of(bundle, threads=1).emit(bundle.config)
    decoder.set_lora(lora)
    reference = load_decoder(bundle, RuntimeOptions(batch=2, context=96, threads=1, accuracy_level=0))
    reference.set_lora(lora)
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [9, 8, 100]]
    for found, expected in (
        (decoder.prefill(prompts), reference.prefill(prompts)),
        (decoder.decode([5, 6]), reference.decode([5, 6])),
        (decoder.decode([None, 7]), reference.decode([None, 7])),
        (decoder.decode([8, 9]), reference.decode([8, 9])),
    ):
        np.testing.assert_allclose(found, expected, atol=0.05)  # logits and LoRA travel as float16
        assert np.abs(found).max() > 1
    assert decoder.lengths.tolist() == [11, 6]


def test_wrong_calls_are_refused(decoder: TrtDecoder) -> None:
    with pytest.raises(ConfigError, match="1 sequences are given to a decoder of batch 2"):
        decoder.prefill([[1]])
    with pytest.raises(
        ConfigError, match="97 positions are needed and the decoder has 96, as many as the bundle was built for"
    ):
        decoder.prefill([[1] * 97, [1]])
    with pytest.raises(ConfigError, match="differ in"):
        decoder.set_lora({})


def test_an_engine_is_chosen_and_refused_with_both_values(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coatrt.bundle import seal

    directory = Path(shutil.copytree(tiny_bundle, tmp_path / "b"))
    (directory / "sm89.engine").write_bytes(b"engine")
    manifest = dict(Bundle.open(tiny_bundle).manifest)
    engine = {
        "file": "sm89.engine",
        "sms": [89],
        "builder": "tensorrt-rtx",
        "version": "9.9",
        "bytes": 6,
        "seconds": 1.0,
        "shapes": {"batch": 1, "prefill": 4, "logits": 1},
    }
    seal(
        directory, {k: v for k, v in manifest.items() if k not in ("format", "coatrt", "files")} | {"engines": [engine]}
    )
    bundle = Bundle.open(directory)
    monkeypatch.setattr(trt, "probe", list)
    with pytest.raises(BuildError, match=r"no NVIDIA GPU here; run the bundle with --backend ort"):
        TrtDecoder.of(bundle)
    monkeypatch.setattr(trt, "probe", lambda: [device_profile("rtx-5090")])
    with pytest.raises(BuildError, match="the bundle has engines for SM89, this GPU is SM120"):
        TrtDecoder.of(bundle)
    monkeypatch.setattr(trt, "probe", lambda: [device_profile("rtx-4090")])
    monkeypatch.setattr(trt.importlib, "import_module", lambda _: types.SimpleNamespace(__version__="1.0"))
    with pytest.raises(BuildError, match=r"needs tensorrt-rtx 9\.9, here is 1\.0"):
        TrtDecoder.of(bundle)
    monkeypatch.setattr(trt.importlib, "import_module", lambda _: types.SimpleNamespace(__version__="9.9"))
    with pytest.raises(BuildError, match="takes a batch of 1, 2 is given"):
        TrtDecoder.of(bundle, batch=2)
