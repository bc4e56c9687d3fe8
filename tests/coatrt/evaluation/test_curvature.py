"""Costs from inputs and output gradients against autograd."""

from pathlib import Path

import pytest
import torch

from coatrt.data.examples import IGNORED, Examples
from coatrt.evaluation.curvature import measure_sensitivity, output_gains
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.modules import load_model
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.codec import decode, encode
from coatrt.quantization.weight_format import WeightFormat

FORMATS = tuple(map(WeightFormat.parse, ("nf2-g32", "int8")))
LAYERS = ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj")
TABLE = "model.embed_tokens"


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Path) -> Checkpoint:
    return Checkpoint.open(tiny_llama)


def text(blocks: int, length: int, seed: int) -> Examples:
    return Examples.of_blocks(torch.randint(0, 256, (blocks, length), generator=torch.Generator().manual_seed(seed)))


# Lengths and targets differ: a whole row, an answer at the end, two answers with a gap and a rest.
MARKED = Examples.of_rows(
    [
        (list(range(5, 25)), [False] + [True] * 19),
        (list(range(40, 52)), [False] * 9 + [True] * 3),
        (list(range(60, 78)), [False] * 4 + [True] * 2 + [False] * 5 + [True] * 3 + [False] * 4),
    ]
)


def taps(checkpoint: Checkpoint, examples: Examples) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return module → (inputs [T, …], gradient [T, N] of the summed loss), by autograd on Hugging Face's own model.

    Every row runs alone and without padding; of the head the positions that predict a target are kept.
    """
    model, seen = load_model(checkpoint), {}
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def keep(name: str) -> object:
        def hook(_: object, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            output.retain_grad()
            seen[name] = inputs[0], output

        return hook

    for name in (*LAYERS, TABLE, "lm_head"):
        model.get_submodule(name).register_forward_hook(keep(name))
    for tokens, targets, last in zip(examples.tokens, examples.targets, examples.last, strict=True):
        row, (places,) = tokens[None, : last + 1], (targets != IGNORED).nonzero(as_tuple=True)
        loss = -model(input_ids=row).logits[0, places - 1].log_softmax(-1)
        loss.gather(1, tokens[places, None]).sum().backward()
        for name, (x, output) in seen.items():
            kept = places - 1 if name == "lm_head" else slice(last)
            found.setdefault(name, []).append((x.detach()[0, kept], output.grad[0, kept]))
    return {name: tuple(map(torch.cat, zip(*rows, strict=True))) for name, rows in found.items()}


def residual(checkpoint: Checkpoint, name: str, fmt: WeightFormat) -> torch.Tensor:
    weight = checkpoint.tensor(f"{name}.weight").float()
    return weight - decode(encode(weight, fmt))


@pytest.mark.parametrize("examples", [text(6, 9, 5), MARKED], ids=["text", "marked"])
def test_gains_are_squared_gradients_per_target(checkpoint: Checkpoint, examples: Examples) -> None:
    found, seen = output_gains(FakeQuantModel(checkpoint, CodeStore(checkpoint)), examples), taps(checkpoint, examples)
    for name in LAYERS:
        expected = seen[name][1].square().sum(0) / examples.target_count
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("examples", [text(6, 13, 0), MARKED], ids=["text", "marked"])
def test_costs_are_those_of_autograd(checkpoint: Checkpoint, examples: Examples) -> None:
    seen, codes = taps(checkpoint, examples), CodeStore(checkpoint)
    model, targets = FakeQuantModel(checkpoint, codes), examples.target_count
    found = measure_sensitivity(model, codes, examples, FORMATS).costs
    for name in (*LAYERS, TABLE):
        for fmt in FORMATS:
            R = residual(checkpoint, name, fmt)
            x, g = seen[name if name != TABLE else "lm_head"]
            exact = 0.5 * (g * (x @ R.T)).sum(1).square().sum() / targets
            if name == TABLE:  # tied: it is read as an embedding too
                ids, g = seen[TABLE]
                exact += 0.5 * (g * R[ids]).sum(1).square().sum() / targets
            assert found[name][str(fmt)] == pytest.approx(float(exact), rel=1e-3)
    assert set(found) == set(checkpoint.matrices.names)
