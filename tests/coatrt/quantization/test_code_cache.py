"""The cache of encoded matrices: its keys, damage, and what is never measured."""

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from coatrt.errors import ConfigError
from coatrt.models.checkpoint import Checkpoint
from coatrt.quantization import code_cache as module
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.codec import decode, encode
from coatrt.quantization.gptq import inverse_factor
from coatrt.quantization.input_moments import Calibration, InputMoments
from coatrt.quantization.quantizers import CALIBRATED, Quantizer
from coatrt.system.tensors import read_tensors
from support.tiny import save_tiny_llama

TOKENS = torch.randint(0, 272, (4, 24), generator=torch.Generator().manual_seed(1))
NAME, TABLE = "model.layers.0.mlp.down_proj", "model.embed_tokens"
QKV = tuple(f"model.layers.0.self_attn.{part}_proj" for part in "qkv")
GATE_UP = tuple(f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up"))
QUANTIZERS: tuple[Quantizer, ...] = ("absmax", "mse", "weighted", "gptq", "feedback", "refined")
"""Those that encode a matrix, or a fused group, by itself."""


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COATRT_CACHE", str(tmp_path))


@pytest.fixture
def checkpoint(tiny_llama: Path) -> Checkpoint:
    return Checkpoint.open(tiny_llama)


def test_every_quantizer_and_calibration_has_codes_of_its_own(checkpoint: Checkpoint, tmp_path: Path) -> None:
    one, two = Calibration(TOKENS), Calibration(TOKENS[:2])
    weight = checkpoint.tensor(f"{NAME}.weight")
    seen = []
    for calibration in (one, two):
        moment = InputMoments(checkpoint, calibration).get(NAME)
        for quantizer in QUANTIZERS:
            found = CodeStore(checkpoint, quantizer, calibration).get(NAME, "nf3-g32")
            assert torch.equal(
                decode(found), decode(encode(weight, "nf3-g32", quantizer, moment, calibration.tokens.numel()))
            )
            seen.append(decode(found))
    distinct = {tuple(weight.flatten().tolist()) for weight in seen}
    assert len(distinct) == 8 + 2  # absmax and mse know no calibration
    assert len(list((tmp_path / "codes").rglob(f"{NAME}.safetensors"))) == 10


def test_the_cache_is_read_and_damage_is_made_again(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = Calibration(TOKENS)
    first = CodeStore(checkpoint, "feedback", calibration).get(NAME, "nf3-g32-dq4-bf16-64")
    (path,) = (tmp_path / "codes").rglob("*.safetensors")
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[-5] ^= 1
    for damaged in (bytes(flipped), data[:-10], b"{}"):
        path.write_bytes(damaged)
        found = CodeStore(checkpoint, "feedback", calibration).get(NAME, "nf3-g32-dq4-bf16-64")
        assert torch.equal(decode(found), decode(first))
        assert read_tensors(path) is not None
    monkeypatch.setattr(module, "encode", lambda *_: pytest.fail("it was encoded again"))
    again = CodeStore(checkpoint, "feedback", calibration).get(NAME, "nf3-g32-dq4-bf16-64")
    assert torch.equal(decode(again), decode(first))
    assert again.constant == first.constant


def test_a_file_under_another_matrix_name_is_made_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    store = CodeStore(checkpoint)
    right = [decode(store.get(name, "int8")) for name in names]
    one, two = (next(tmp_path.rglob(f"{name}.safetensors")) for name in names)
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    again = CodeStore(checkpoint)
    assert all(torch.equal(decode(again.get(name, "int8")), weight) for name, weight in zip(names, right, strict=True))


@pytest.mark.parametrize("tied", [True, False])
def test_tables_are_encoded_for_what_the_head_reads(tmp_path: Path, tied: bool) -> None:
    checkpoint = Checkpoint.open(save_tiny_llama(tmp_path / "model", tied=tied))
    calibration = Calibration(TOKENS)
    moments = InputMoments(checkpoint, calibration)
    for quantizer in QUANTIZERS:
        codes = CodeStore(checkpoint, quantizer, calibration)
        for name in (TABLE,) if tied else (TABLE, "lm_head"):
            weight = checkpoint.tensor(f"{name}.weight")
            if quantizer in CALIBRATED and (tied or name == "lm_head"):
                want = encode(weight, "nf2-g32", quantizer, moments.get(name), TOKENS.numel())
                assert not torch.equal(decode(want), decode(encode(weight, "nf2-g32", "mse")))
            else:
                want = encode(weight, "nf2-g32", "mse")
            found = codes.get(name, "nf2-g32")
            assert torch.equal(decode(found), decode(want))
            assert found.grid == want.grid


def test_16_bits_need_no_moments(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InputMoments, "_measure", lambda *_: pytest.fail("moments were measured"))
    for quantizer in QUANTIZERS:
        CodeStore(checkpoint, quantizer, Calibration(TOKENS)).get(NAME, "fp16")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_calibration_must_be_given(checkpoint: Checkpoint) -> None:
    for quantizer in QUANTIZERS[2:]:
        with pytest.raises(ConfigError, match=f"{quantizer} needs calibration tokens"):
            CodeStore(checkpoint, quantizer)


def test_codes_are_kept_while_memory_is_free(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def held(store: CodeStore) -> list[str]:
        found = [f"{name} {fmt}" for name, fmt in store._matrices]
        assert store._bytes == sum(matrix.nbytes for matrix in store._matrices.values())
        return found

    def fill(store: CodeStore) -> None:
        for fmt in ("int8", "nf4-g32", "nvfp4"):
            store.get(NAME, fmt)

    one = CodeStore(checkpoint).get(NAME, "int8").nbytes  # a byte a weight, and scales
    assert one == 64 * 160 + 2 * 64
    monkeypatch.setattr(module, "free_memory", lambda: 0)
    few = CodeStore(checkpoint)
    fill(few)
    assert len(held(few)) == 3  # less than a store may always keep
    monkeypatch.setattr(module, "_MIN_BYTES", 5 * one // 2)
    fill(scarce := CodeStore(checkpoint))
    assert held(scarce) == [f"{NAME} nf4-g32", f"{NAME} nvfp4"]
    monkeypatch.setattr(module, "_MIN_BYTES", one // 2)
    fill(nothing := CodeStore(checkpoint))
    assert held(nothing) == []
    monkeypatch.setattr(module, "free_memory", lambda: 1 << 40)
    fill(ample := CodeStore(checkpoint))
    assert len(held(ample)) == 3


def test_matrices_that_read_one_input_are_encoded_with_one_factor(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def counted(moment: torch.Tensor) -> torch.Tensor:
        sizes.append(len(moment))
        return inverse_factor(moment)

    monkeypatch.setattr("coatrt.quantization.gptq.inverse_factor", counted)
    codes = CodeStore(checkpoint, "feedback", Calibration(TOKENS))
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"):
        for text in ("nf3-g32", "int4-g32"):
            codes.get(f"model.layers.0.{name}", text)
    assert sizes == [64, 160]


def test_what_only_encoding_needs_is_released_and_made_again(checkpoint: Checkpoint) -> None:
    codes = CodeStore(checkpoint, "feedback", Calibration(TOKENS))
    codes.get(NAME, "nf3-g32")
    assert codes._moments is not None and codes._moments._moments and codes._factors._value is not None
    codes.release()
    assert not codes._moments._moments and codes._factors._value is None
    moment = InputMoments(checkpoint, Calibration(TOKENS)).get(NAME)
    want = encode(checkpoint.tensor(f"{NAME}.weight"), "int4-g32", "feedback", moment, TOKENS.numel())
    assert torch.equal(codes.get(NAME, "int4-g32").codes, want.codes)
    CodeStore(checkpoint).release()  # which has no moments


@pytest.mark.parametrize("text", ["nf3-g32", "nvfp4", "int4-g32", "int8"])
def test_a_fused_group_is_encoded_as_one_matrix(
    checkpoint: Checkpoint, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = Calibration(TOKENS)
    moments, store = InputMoments(checkpoint, calibration), CodeStore(checkpoint, "refined", calibration)
    for names in (QKV, GATE_UP):
        weight = torch.cat([checkpoint.tensor(f"{name}.weight") for name in names])
        whole = encode(weight, text, "refined", moments.get(names[0]), TOKENS.numel())
        parts = {name: store.get(name, text) for name in reversed(names)}
        assert torch.equal(torch.cat([decode(parts[name]) for name in names]), decode(whole))
        assert all((part.grid, part.constant) == (whole.grid, whole.constant) for part in parts.values())
        assert (whole.levels is not None) == (text == "nf3-g32")
    monkeypatch.setattr(module, "encode", lambda *_: pytest.fail("it was encoded again"))
    again = CodeStore(checkpoint, "refined", calibration)  # from the cache on disk
    for name in (*QKV, *GATE_UP):
        assert torch.equal(decode(again.get(name, text)), decode(store.get(name, text)))
        assert again.get(name, text).grid == store.get(name, text).grid
        assert again.get(name, text).constant == store.get(name, text).constant


def test_a_damaged_member_of_a_group_is_made_again_like_the_first(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def stored() -> dict[str, bytes]:
        content = {}
        for name in QKV:
            entry = read_tensors(next(tmp_path.rglob(f"{name}.safetensors")))
            assert entry is not None
            tensors, metadata = entry
            fields = [tensors[field].contiguous().view(torch.uint8).numpy().tobytes() for field in sorted(tensors)]
            content[name] = b"".join([*fields, repr(sorted(metadata.items())).encode()])
        return content

    first = CodeStore(checkpoint, "refined", Calibration(TOKENS))
    want = decode(first.get(QKV[0], "nf3-g32"))
    before = stored()
    for name, damage in ((QKV[1], b"{}"), (QKV[2], None)):
        path = next(tmp_path.rglob(f"{name}.safetensors"))
        path.write_bytes(path.read_bytes()[:-10] if damage is None else damage)
        again = CodeStore(checkpoint, "refined", Calibration(TOKENS))
        assert torch.equal(decode(again.get(QKV[0], "nf3-g32")), want)
        assert read_tensors(path) is None  # nobody asked for it yet
        assert torch.equal(decode(again.get(name, "nf3-g32")), decode(first.get(name, "nf3-g32")))
        assert stored() == before


def test_double_quantization_is_encoded_alone(checkpoint: Checkpoint, tmp_path: Path) -> None:
    calibration, text = Calibration(TOKENS), "nf3-g32-dq4-bf16-64"
    moment = InputMoments(checkpoint, calibration).get(QKV[0])
    found = CodeStore(checkpoint, "refined", calibration).get(QKV[1], text)
    want = encode(checkpoint.tensor(f"{QKV[1]}.weight"), text, "refined", moment, TOKENS.numel())
    assert torch.equal(decode(found), decode(want)) and found.grid == want.grid
    assert [path.stem for path in (tmp_path / "codes").rglob("*.safetensors")] == [QKV[1]]


def test_other_quantizers_encode_each_matrix_of_a_group_alone(checkpoint: Checkpoint, tmp_path: Path) -> None:
    CodeStore(checkpoint, "feedback", Calibration(TOKENS)).get(QKV[0], "nvfp4")
    assert [path.stem for path in (tmp_path / "codes").rglob("*.safetensors")] == [QKV[0]]


def test_what_a_quantized_checkpoint_stores_stays_though_its_group_is_encoded(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    own = encode(checkpoint.tensor(f"{QKV[0]}.weight"), "int4-g32", "absmax")

    class Stored:
        formats: ClassVar = {QKV[0]: "int4-g32"}
        constants: ClassVar = dict[str, float]()
        files: ClassVar = dict[str, str]()

        def tensors(self, directory: Path, name: str) -> tuple[Any, Any]:
            return own.codes, own.scales

    mixed = replace(checkpoint, codes=Stored())  # type: ignore[arg-type]
    store = CodeStore(mixed, "refined", Calibration(TOKENS))
    weights = [checkpoint.tensor(f"{name}.weight") for name in QKV[1:]]
    moment = InputMoments(checkpoint, Calibration(TOKENS)).get(QKV[0])
    want = decode(encode(torch.cat(weights), "int4-g32", "refined", moment, TOKENS.numel()))
    assert torch.equal(torch.cat([decode(store.get(name, "int4-g32")) for name in QKV[1:]]), want)
    assert torch.equal(store.get(QKV[0], "int4-g32").codes, own.codes)
    assert not list((tmp_path / "codes").rglob(f"{QKV[0]}.safetensors"))


def test_a_group_that_is_encoded_again_is_counted_once(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    store = CodeStore(checkpoint, "refined", Calibration(TOKENS))
    store.get(NAME, "int8")  # measures the moments
    monkeypatch.setattr(module, "write_tensors", full)
    monkeypatch.setattr(module, "free_memory", lambda: 0)
    monkeypatch.setattr(module, "_MIN_BYTES", 2 * 64 * 65)  # q and one other
    for name in (QKV[0], QKV[1], QKV[2], QKV[0]):
        want = store.get(name, "int8")
        assert store._bytes == sum(matrix.nbytes for matrix in store._matrices.values()) <= 2 * 64 * 65
        assert store._matrices[name, "int8"] is want
