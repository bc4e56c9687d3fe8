"""Second moments against hooks in float64; what is cached, and that damage is noticed."""

from pathlib import Path

import pytest
import torch

from coatrt.data.documents import batches
from coatrt.data.examples import Examples
from coatrt.errors import CheckpointError, ConfigError
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.modules import load_model
from coatrt.quantization import input_moments as calibration
from coatrt.quantization.input_moments import Calibration, InputMoments, calibration_examples, required_tokens
from coatrt.system.notices import warn_once
from coatrt.system.tensors import read_tensors
from support.programs import run_program
from support.tiny import save_tiny_llama

TOKENS = torch.randint(0, 272, (6, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COATRT_CACHE", str(tmp_path))


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> dict[str, torch.Tensor]:
    """Every matrix's own input seen by a forward hook in float64, all tokens in one batch."""
    checkpoint = Checkpoint.open(tiny_llama)
    model, found = load_model(checkpoint, torch.float64), {}

    def keep(name: str):  # type: ignore[no-untyped-def]
        def hook(_: object, inputs: tuple[torch.Tensor, ...], __: object) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            found[name] = torch.einsum("ti,tj->ij", x, x) / len(x)

        return hook

    for matrix in checkpoint.matrices.targets:
        model.get_submodule(matrix.name).register_forward_hook(keep(matrix.name))
    model.lm_head.register_forward_hook(keep("model.embed_tokens"))  # the tied table, as the head reads it
    with torch.no_grad():
        model(input_ids=TOKENS)
    return found


@pytest.mark.parametrize("least", [1 << 30, 4 * 160**2])  # all groups at once, about one at a time
def test_moments_equal_those_of_every_matrix_alone(
    tiny_llama: Path, expected: dict[str, torch.Tensor], least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_MIN_BYTES", least)
    monkeypatch.setattr(calibration, "free_memory", lambda: 0)
    runs = []
    measure = calibration.measure_moments

    def counted(model, tokens, names, *options):  # type: ignore[no-untyped-def]
        runs.append(list(names))
        return measure(model, tokens, names, *options)

    monkeypatch.setattr(calibration, "measure_moments", counted)
    checkpoint = Checkpoint.open(tiny_llama)
    moments = InputMoments(checkpoint, Calibration(TOKENS))
    for matrix in checkpoint.matrices.matrices:
        found = moments.get(matrix.name)
        assert found.dtype == torch.float32
        want = expected[matrix.name]
        torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-5 * float(want.diagonal().mean()))
    assert moments.get("model.layers.0.self_attn.q_proj") is moments.get("model.layers.0.self_attn.v_proj")
    leaders = [name for run in runs for name in run]
    assert len(leaders) == len(set(leaders)) == 2 * 4 + 1  # q/k/v, o, gate/up and down of two layers, the head
    assert len(runs) == (4 if least == 4 * 160**2 else 1)


def test_the_cache_is_read_and_damage_is_made_again(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, name = Checkpoint.open(tiny_llama), "model.layers.1.mlp.up_proj"
    first = InputMoments(checkpoint, Calibration(TOKENS)).get(name)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 9
    (path,) = (file for file in files if "layers.1.mlp.gate_proj" in file.name)
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[-3] ^= 1
    for damaged in (bytes(flipped), data[:-100], b"", data.replace(b"moment", b"momenT")):
        path.write_bytes(damaged)
        assert torch.equal(InputMoments(checkpoint, Calibration(TOKENS)).get(name), first)
        assert read_tensors(path) is not None  # the order of metadata in a file is not fixed
    (other,) = (file for file in files if "layers.0.mlp.down_proj" in file.name)
    path.write_bytes(other.read_bytes())  # whole, but of another input
    if InputMoments(checkpoint, Calibration(TOKENS))._read("model.layers.1.mlp.gate_proj") is not None:
        pytest.fail("a moment of another width was taken")
    path.write_bytes(data)
    monkeypatch.setattr(calibration, "load_model", lambda _: pytest.fail("the model was loaded"))
    assert torch.equal(InputMoments(checkpoint, Calibration(TOKENS)).get(name), first)


def test_other_tokens_have_another_place(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint, name = Checkpoint.open(tiny_llama), "model.layers.0.self_attn.o_proj"
    one, two = Calibration(TOKENS), Calibration(TOKENS[:3])
    assert one.hash != two.hash != Calibration(TOKENS[:3].reshape(6, 10)).hash
    assert Calibration(TOKENS.clone()).hash == one.hash
    found = [InputMoments(checkpoint, given).get(name) for given in (one, two)]
    assert (found[0] - found[1]).abs().max() > 1e-4
    assert len(list(tmp_path.rglob("*.safetensors"))) == 18


def test_a_file_under_another_matrix_name_is_measured_again(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COATRT_CACHE", str(tmp_path))
    tokens = Calibration(torch.randint(0, 272, (4, 24), generator=torch.Generator().manual_seed(1)))
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    right = [InputMoments(Checkpoint.open(tiny_llama), tokens).get(name) for name in names]
    one, two = (next(tmp_path.rglob(f"{name}.safetensors")) for name in names)
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    again = InputMoments(Checkpoint.open(tiny_llama), tokens)
    assert all(torch.equal(again.get(name), moment) for name, moment in zip(names, right, strict=True))


def test_tokens_are_saved_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "tokens.safetensors"
    given = Calibration(TOKENS)
    given.save(path)
    assert torch.equal(Calibration.load(path).tokens, TOKENS)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="missing or damaged"):
        Calibration.load(path)
    untied = Checkpoint.open(save_tiny_llama(tmp_path / "untied", tied=False))
    with pytest.raises(ConfigError, match="reads token ids"):
        InputMoments(untied, given).get("model.embed_tokens")
    assert InputMoments(untied, given).get("lm_head").shape == (64, 64)


def test_error_feedback_wants_tokens_for_every_input(tiny_llama: Path) -> None:
    matrices = Checkpoint.open(tiny_llama).matrices
    assert required_tokens(matrices) == 4 * 160  # its widest inputs are those of down_proj


def test_short_examples_make_up_in_number() -> None:
    blocks = Examples.of_blocks(torch.arange(60).view(10, 6))
    found = calibration_examples(blocks, 4, 6, seed=1)
    assert torch.equal(found.tokens, blocks[batches(10, 4, 0, 1)].tokens)  # whole ones: as many as asked for
    assert len(calibration_examples(blocks, 12, 6, seed=1)) == 10  # and no more than there are
    assert len(calibration_examples(blocks, 4, 3, seed=1)) == 4
    lengths = [2, 5, 3, 6, 4, 2, 2, 6, 3, 5]
    short = Examples.of_rows([([100 + i] * n, [place == n - 1 for place in range(n)]) for i, n in enumerate(lengths)])
    found = calibration_examples(short, 3, 6, seed=1)
    used = [lengths[int(token) - 100] for token in found.tokens[:, 0]]
    assert sum(used) >= 18 > sum(used[:-1])
    assert len(set(found.tokens[:, 0].tolist())) == len(used)
    assert Calibration.of(found).tokens.numel() > 18 - 6


def test_moments_that_cannot_be_kept_are_measured_one_by_one(
    tiny_llama: Path,
    expected: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("COATRT_CACHE", str(tmp_path / "file"))
    warn_once.cache_clear()
    runs: list[int] = []
    measure = calibration.measure_moments

    def counted(model, tokens, names, *options):  # type: ignore[no-untyped-def]
        runs.append(len(names))
        return measure(model, tokens, names, *options)

    monkeypatch.setattr(calibration, "measure_moments", counted)
    moments = InputMoments(Checkpoint.open(tiny_llama), Calibration(TOKENS))
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"]
    for name in names:
        torch.testing.assert_close(moments.get(name).double(), expected[name], rtol=1e-5, atol=1e-5)
    assert runs[1:] == [1]
    assert len(capsys.readouterr().err.splitlines()) == 1


_BESIDE = """
import sys
import torch
import coatrt.quantization.input_moments as module
from coatrt.models.checkpoint import Checkpoint
from support import pretend_device

torch.set_num_threads(1)
tokens = torch.arange(120).view(4, 30)
ran, real = [], module.measure_moments
module.measure_moments = lambda model, *rest: ran.append(model.device.type) or real(model, *rest)
found = {}
for place, free, compute in (("a", 1 << 40, "cpu"), ("b", 1 << 40, pretend_device.NAME), ("c", 0, pretend_device.NAME)):
    module.free_memory = lambda: free
    moments = module.InputMoments(Checkpoint.open(sys.argv[1]), module.Calibration(tokens), compute=compute)
    moments._root = moments._root.with_name(place)
    found[place] = moments.get("model.layers.0.mlp.down_proj")
    assert found[place].device.type == compute, place
assert ran[:2] == ["cpu", pretend_device.NAME] and set(ran[2:]) == {"cpu"}, ran
for place in "bc":
    torch.testing.assert_close(found[place].cpu(), found["a"])
"""


def test_moments_are_measured_on_the_device_where_the_model_fits(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COATRT_CACHE", str(tmp_path))
    done = run_program(_BESIDE, tiny_llama)
    assert done.returncode == 0, done.stderr[-3000:]


def test_other_examples_are_not_those_of_the_calibration() -> None:
    blocks = Examples.of_blocks(torch.arange(60).view(10, 6))
    first, others = (calibration_examples(blocks, 5, 6, 1, flag).tokens for flag in (False, True))
    assert sorted([*first[:, 0].tolist(), *others[:, 0].tolist()]) == list(range(0, 60, 6))
    assert len(calibration_examples(blocks, 12, 6, 1, True)) == 10
