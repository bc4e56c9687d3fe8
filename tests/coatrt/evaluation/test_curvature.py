"""Costs from inputs and output gradients against autograd."""

from pathlib import Path

import pytest
import torch

from coatrt.configs.space import ConfigSpace
from coatrt.data.examples import IGNORED, Examples
from coatrt.errors import ConfigError
from coatrt.evaluation.curvature import kfac_costs, output_gains, token_costs
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.evaluation.sensitivity import fisher_costs, measure_sensitivity, measured_costs, relative_errors
from coatrt.models.checkpoint import Checkpoint, load_model
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
        expected = seen[name][1].square().sum(0) / examples.predicted
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-9)


def test_plain_tokens_are_text(checkpoint: Checkpoint) -> None:
    model, blocks = FakeQuantModel(checkpoint, CodeStore(checkpoint)), text(3, 8, 2)
    plain, marked = output_gains(model, blocks.tokens), output_gains(model, blocks)
    assert all(torch.equal(plain[name], marked[name]) for name in marked)


@pytest.mark.parametrize("examples", [text(6, 13, 0), MARKED], ids=["text", "marked"])
def test_costs_are_those_of_autograd(checkpoint: Checkpoint, examples: Examples) -> None:
    seen, codes = taps(checkpoint, examples), CodeStore(checkpoint)
    model, targets = FakeQuantModel(checkpoint, codes), examples.predicted
    kfac, token = (
        measure_sensitivity(model, codes, examples, FORMATS, predictor=name).costs for name in ("kfac", "tokens")
    )
    for name in (*LAYERS, TABLE):
        for fmt in FORMATS:
            R = residual(checkpoint, name, fmt)
            x, g = seen[name if name != TABLE else "lm_head"]
            G, H = g.square().sum(0) / targets, x.T @ x / len(x)
            factored = 0.5 * sum(G[n] * (R[n] @ H @ R[n]) for n in range(len(R)))
            exact = 0.5 * (g * (x @ R.T)).sum(1).square().sum() / targets
            if name == TABLE:  # tied: it is read as an embedding too
                ids, g = seen[TABLE]
                factored += 0.5 * (g.square() * R[ids].square()).sum() / targets
                exact += 0.5 * (g * R[ids]).sum(1).square().sum() / targets
            assert kfac[name][str(fmt)] == pytest.approx(float(factored), rel=1e-3)
            assert token[name][str(fmt)] == pytest.approx(float(exact), rel=1e-3)
    assert set(kfac) == set(token) == set(checkpoint.matrices.names)


def test_one_token_leaves_nothing_to_approximate(checkpoint: Checkpoint) -> None:
    """With one token F = (g xᵀ)²: all three are closed forms of one g and one x."""
    blocks, codes = Examples.of_blocks(torch.tensor([[65, 66]])), CodeStore(checkpoint)
    seen, model = taps(checkpoint, blocks), FakeQuantModel(checkpoint, codes)
    costs = [cost(model, codes, blocks, FORMATS) for cost in (fisher_costs, kfac_costs, token_costs)]
    for name in LAYERS:
        R = residual(checkpoint, name, FORMATS[0])
        (x,), (g,) = seen[name]
        expected = (
            0.5 * (torch.outer(g, x).square() * R.square()).sum(),
            0.5 * (g.square() * (R @ x).square()).sum(),
            0.5 * (g @ R @ x).square(),
        )
        for found, value in zip(costs, expected, strict=True):
            assert found[name]["nf2-g32"] == pytest.approx(float(value), rel=1e-3, abs=1e-12)


def test_measured_costs_are_losses_of_one_group_at_a_time(checkpoint: Checkpoint) -> None:
    codes = CodeStore(checkpoint)
    model, space = FakeQuantModel(checkpoint, codes), ConfigSpace(checkpoint.matrices, FORMATS)
    blocks = torch.randint(0, 256, (4, 17), generator=torch.Generator().manual_seed(1))
    errors = relative_errors(model, codes, FORMATS)
    costs = measured_costs(model, blocks, space, errors)
    rises = {}
    for group in space.groups:
        theirs = load_model(checkpoint)
        base = float(theirs(input_ids=blocks, labels=blocks).loss)
        for name in group:
            weight = theirs.get_submodule(name).weight
            weight.data = decode(encode(weight.data, "nf2-g32"))
        rises[group] = float(theirs(input_ids=blocks, labels=blocks).loss) - base
    for group, rise in rises.items():
        if rise > 0.01:
            assert sum(costs[name]["nf2-g32"] for name in group) == pytest.approx(rise, rel=0.02, abs=2e-4)
        for name in group:
            ratio = (errors[name]["int8"] / errors[name]["nf2-g32"]) ** 2
            assert costs[name]["int8"] == pytest.approx(costs[name]["nf2-g32"] * ratio)
            assert costs[name]["int8"] > 0


def test_a_predictor_that_is_not_there_is_refused(checkpoint: Checkpoint) -> None:
    codes = CodeStore(checkpoint)
    with pytest.raises(ConfigError, match="no predictor 'oracle'; give one of fisher, kfac, tokens"):
        measure_sensitivity(FakeQuantModel(checkpoint, codes), codes, torch.zeros(1, 4), FORMATS, predictor="oracle")  # type: ignore[arg-type]
