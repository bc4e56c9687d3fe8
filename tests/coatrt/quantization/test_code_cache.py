"""The cache of encoded matrices: its keys, damage, and what is never measured."""

from pathlib import Path

import pytest
import torch

from coatrt.errors import ConfigError
from coatrt.models.checkpoint import Checkpoint
from coatrt.quantization import code_cache as module
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.codec import decode, encode
from coatrt.quantization.gptq import inverse_factor
from coatrt.quantization.input_moments import Calibration, InputMoments
from coatrt.quantization.quantizers import QUANTIZERS
from coatrt.system.tensors import read_tensors
from support.tiny import save_tiny_llama

TOKENS = torch.randint(0, 272, (4, 24), generator=torch.Generator().manual_seed(1))
NAME, TABLE = "model.layers.0.mlp.down_proj", "model.embed_tokens"


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
    assert len(distinct) == 6 + 2  # absmax and mse know no calibration
    assert len(list((tmp_path / "codes").rglob(f"{NAME}.safetensors"))) == 8


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
            weight, calibrated = checkpoint.tensor(f"{name}.weight"), quantizer in ("weighted", "gptq", "feedback")
            if calibrated and (tied or name == "lm_head"):
                want = encode(weight, "nf2-g32", quantizer, moments.get(name), TOKENS.numel())
                assert not torch.equal(decode(want), decode(encode(weight, "nf2-g32", "mse")))
            else:
                want = encode(weight, "nf2-g32", "mse")
            assert torch.equal(decode(codes.get(name, "nf2-g32")), decode(want))


def test_16_bits_need_no_moments(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InputMoments, "_measure", lambda *_: pytest.fail("moments were measured"))
    for quantizer in QUANTIZERS:
        CodeStore(checkpoint, quantizer, Calibration(TOKENS)).get(NAME, "fp16")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_calibration_must_be_given(checkpoint: Checkpoint) -> None:
    for quantizer in ("weighted", "gptq", "feedback"):
        with pytest.raises(ConfigError, match="needs calibration tokens"):
            CodeStore(checkpoint, quantizer)  # type: ignore[arg-type]


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
