"""The closed-form term of B against numpy's least squares over the inputs themselves."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from coatrt.adapter.adapter import Adapter
from coatrt.adapter.compensation import Compensator
from coatrt.adapter.features import ConfigEncoder
from coatrt.adapter.lora import CoaLora
from coatrt.configs.config import QuantConfig
from coatrt.configs.lora_contract import LoraContract, contract_for
from coatrt.evaluation.curvature import output_gains
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.modules import load_model
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.codec import decode, encode
from coatrt.quantization.input_moments import Calibration, InputMoments, calibration_examples
from coatrt.quantization.weight_format import WeightFormat
from coatrt.training.run import train
from support.tiny import text_data, tiny_options

LOW, HIGH = WeightFormat.parse("nf2-g32"), WeightFormat.parse("int8")


class Setting:
    """A tiny model, its compensator, and what its matrices read; of few tokens the compensator keeps the inputs."""

    def __init__(self, directory: Path, blocks: int) -> None:
        self.checkpoint = Checkpoint.open(directory)
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, 256, (blocks, 32), generator=generator)
        self.contract: LoraContract = contract_for(self.checkpoint.matrices, 16, 32)
        self.model = FakeQuantModel(self.checkpoint, CodeStore(self.checkpoint))
        moments = InputMoments(self.checkpoint, Calibration(self.tokens))
        self.compensator = Compensator(self.model, moments, self.contract)
        self.inputs = self._inputs()

    @torch.no_grad()
    def _inputs(self) -> dict[str, np.ndarray]:
        """Return matrix name → x, float64 [tokens, K], from a model of its own."""
        model, found = load_model(self.checkpoint), {}
        for tensor in self.contract.tensors:
            model.get_submodule(tensor.matrix).register_forward_pre_hook(
                lambda _, given, name=tensor.matrix: found.__setitem__(name, given[0].flatten(0, 1).double().numpy())
            )
        model(input_ids=self.tokens)
        return found

    def lost(self, matrix: str, fmt: WeightFormat) -> np.ndarray:
        """Return W − Q(W), float64 [N, K]."""
        weight = self.checkpoint.tensor(f"{matrix}.weight").float()
        return (weight - decode(encode(weight, fmt))).double().numpy()


def term(compensator: Compensator, matrix: str, fmt: WeightFormat, A: Tensor) -> Tensor:
    """Return C [r, N]."""
    return compensator.terms([matrix], [fmt], compensator.reading([matrix], A[None]))[0]


def held(compensator: Compensator, matrix: str) -> int:
    """Return the bytes of what is kept of a matrix's inputs."""
    return compensator._grams[matrix]._values.nbytes


@pytest.fixture(scope="module", params=[3, 16], ids=["inputs", "moments"])
def setting(tiny_llama: Path, request: pytest.FixtureRequest) -> Setting:
    return Setting(tiny_llama, request.param)


def test_the_smaller_form_is_kept(setting: Setting) -> None:
    inputs = len(setting.tokens) == 3
    for tensor in setting.contract.tensors:
        tokens = setting.tokens.numel()
        assert held(setting.compensator, tensor.matrix) == (2 * tokens if inputs else 4 * tensor.K) * tensor.K
        assert inputs == (2 * tokens * tensor.K < 4 * tensor.K**2)


def test_the_term_is_least_squares_over_the_inputs(setting: Setting) -> None:
    generator = torch.Generator().manual_seed(1)
    for tensor in setting.contract.tensors:
        A = torch.randn(tensor.K, tensor.rank, generator=generator)
        x = setting.inputs[tensor.matrix]
        read, wanted = x @ A.double().numpy(), x @ setting.lost(tensor.matrix, LOW).T
        best = np.linalg.lstsq(read, wanted, rcond=None)[0]
        left = np.linalg.norm(wanted - read @ best)
        found = term(setting.compensator, tensor.matrix, LOW, A).double().numpy()
        assert found.shape == (tensor.rank, tensor.N)
        assert np.linalg.norm(wanted - read @ found) == pytest.approx(left, rel=1e-4)
        assert left < 0.95 * np.linalg.norm(wanted)
        np.testing.assert_allclose(found, best, atol=0.02 * np.abs(best).max())


def test_of_many_tokens_the_first_are_kept(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coatrt.adapter.compensation._MAX_TOKENS", 100)
    setting = Setting(tiny_llama, 16)
    for tensor in setting.contract.tensors:  # 3 blocks of 32 for inputs of 64 and of 160
        assert held(setting.compensator, tensor.matrix) == 2 * 96 * tensor.K
        A = torch.randn(tensor.K, tensor.rank, generator=torch.Generator().manual_seed(1))
        x = setting.inputs[tensor.matrix][:96]
        read, wanted = x @ A.double().numpy(), x @ setting.lost(tensor.matrix, LOW).T
        best = np.linalg.lstsq(read, wanted, rcond=None)[0]
        found = term(setting.compensator, tensor.matrix, LOW, A).double().numpy()
        np.testing.assert_allclose(found, best, atol=0.02 * np.abs(best).max())


def test_what_c_takes_from_a_is_computed_once_until_a_changes(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrices, calls = setting.checkpoint.matrices, []
    encoder = ConfigEncoder(matrices, (LOW, HIGH), {name: {str(LOW): 1.0, str(HIGH): 0.1} for name in matrices.names})
    lora = CoaLora(setting.contract, encoder, "none")
    lora.compensate(setting.compensator)
    low, high = (QuantConfig(dict.fromkeys(matrices.names, fmt)) for fmt in (LOW, HIGH))
    reading = Compensator.reading
    monkeypatch.setattr(Compensator, "reading", lambda self, names, A: calls.extend(names) or reading(self, names, A))
    optimizer = torch.optim.AdamW(lora.parameters(), lr=0.1, fused=True)  # counts no version of what it changes
    for _ in range(2):
        calls.clear()
        found = {fmt: lora.pairs(config) for fmt, config in ((LOW, low), (HIGH, high))}
        assert sorted(calls) == sorted(t.matrix for t in setting.contract.tensors)
        for fmt, pairs in found.items():
            for matrix, (A, B) in pairs.items():
                trained = lora.shared()[matrix][1] * 2.0  # s = alpha / rank
                wanted = term(setting.compensator, matrix, fmt, A.detach())
                torch.testing.assert_close(B.detach(), trained + wanted, rtol=1e-5, atol=1e-6)
        sum(A.square().sum() + B.square().sum() for A, B in found[LOW].values()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_start_is_the_best_subspace(setting: Setting, share: float) -> None:
    """Eckart and Young: of the weighted output error, what is left are the singular values after the first r."""
    for tensor in setting.contract.tensors:
        gains = torch.rand(tensor.N, generator=torch.Generator().manual_seed(2)) + 0.1
        A = setting.compensator.start(tensor, LOW, gains, 0, share)
        np.testing.assert_allclose(A.norm(dim=0).numpy(), 1, rtol=1e-4)
        assert A.shape == (tensor.K, tensor.rank)
        assert np.linalg.matrix_rank(A.numpy()) == tensor.rank
        A, rank = A[:, : round(share * tensor.rank)], round(share * tensor.rank)
        assert (A.max(0).values >= -A.min(0).values).all()
        weight = np.sqrt(gains.numpy() + 0.01 * gains.mean().item())
        error = setting.inputs[tensor.matrix] @ setting.lost(tensor.matrix, LOW).T
        values = np.linalg.svd(error * weight, compute_uv=False)
        C = term(setting.compensator, tensor.matrix, LOW, A).double().numpy()
        left = np.linalg.norm((error - setting.inputs[tensor.matrix] @ A.double().numpy() @ C) * weight)
        assert left == pytest.approx(float(np.sqrt((values[rank:] ** 2).sum())), rel=2e-3)


def test_a_rank_beyond_the_directions_is_filled(setting: Setting) -> None:
    contract = contract_for(setting.checkpoint.matrices, 16, 32, {"k_proj": 48})
    (tensor, *_) = [t for t in contract.tensors if t.matrix.endswith("k_proj")]
    assert tensor.N < tensor.rank < tensor.K
    A = setting.compensator.start(tensor, LOW, torch.ones(tensor.N), 0)
    assert np.linalg.matrix_rank(A.numpy()) == tensor.rank
    error = setting.inputs[tensor.matrix] @ setting.lost(tensor.matrix, LOW).T
    C = term(setting.compensator, tensor.matrix, LOW, A).double().numpy()
    assert np.linalg.norm(error - setting.inputs[tensor.matrix] @ A.double().numpy() @ C) < 1e-3 * np.linalg.norm(error)


@pytest.mark.parametrize(
    ("start", "precision"), [("random", "float32"), ("residual", "float32"), ("residual", "bfloat16")]
)
def test_an_adapter_keeps_the_terms_of_its_last_a(tiny_llama: Path, tmp_path: Path, start: str, precision: str) -> None:
    """The terms of a bfloat16 base too are those of the exact weights."""
    options = tiny_options(preset="none", formats=("nf2-g32", "int8"), start=start, precision=precision)
    adapter = train(tiny_llama, text_data(tiny_llama), tmp_path / "a", options)
    checkpoint = adapter.checkpoint()
    assert adapter.calibration is not None
    moments = InputMoments(checkpoint, adapter.calibration)
    model = FakeQuantModel(checkpoint, CodeStore(checkpoint), dtype=getattr(torch, precision))
    compensator = Compensator(model, moments, adapter.description.contract)
    low, high = (adapter.emit(adapter.description.space.uniform(text)) for text in ("nf2-g32", "int8"))
    for tensor in adapter.description.contract.tensors:
        a, b = adapter.lora.shared()[tensor.matrix]
        trained = b * adapter.description.contract.scale(tensor)
        for emitted, fmt in ((low, LOW), (high, HIGH)):
            assert torch.equal(emitted[tensor.A], a)
            found = term(compensator, tensor.matrix, fmt, a)
            half = 2**-11 * float(found.abs().max())  # the table is float16
            np.testing.assert_allclose(emitted[tensor.B].numpy(), (trained + found).numpy(), rtol=1e-4, atol=2 * half)
        assert (low[tensor.B] - trained).norm() > 5 * (high[tensor.B] - trained).norm()
    again = Adapter.from_pretrained(tmp_path / "a")
    assert all(
        torch.equal(value, low[name]) for name, value in again.emit(again.description.space.uniform("nf2-g32")).items()
    )


@pytest.mark.parametrize(("start", "share"), [("residual", 1.0), ("mixed", 0.5)])
def test_a_starts_from_what_the_lowest_format_takes_away(
    tiny_llama: Path, tmp_path: Path, start: str, share: float
) -> None:
    """A rate of almost nothing leaves A where it began."""
    options = tiny_options(preset="none", formats=("nf2-g32", "int8"), start=start, learning_rate=1e-9, steps=1)
    data = text_data(tiny_llama)
    adapter = train(tiny_llama, data, tmp_path / "a", options)
    assert adapter.calibration is not None
    checkpoint = adapter.checkpoint()
    model = FakeQuantModel(checkpoint, CodeStore(checkpoint))
    compensator = Compensator(model, InputMoments(checkpoint, adapter.calibration), adapter.description.contract)
    gains = output_gains(model, calibration_examples(data.train, 4, 32, 0, others=True))
    for i, tensor in enumerate(adapter.description.contract.tensors):
        expected = compensator.start(tensor, LOW, gains[tensor.matrix], i, share)
        np.testing.assert_allclose(adapter.lora.shared()[tensor.matrix][0].numpy(), expected.numpy(), atol=1e-4)
