import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coatrt.configs.space import ConfigSpace
from coatrt.models.matrices import Matrix, ModelMatrices
from coatrt.quantization.weight_format import WeightFormat

pytestmark = pytest.mark.fast

FORMATS = tuple(map(WeightFormat.parse, ["int8", "int4-g64", "nf3-g64", "nf2-g64"]))


def big_model(layers=12):
    rows = [Matrix("model.embed_tokens", 4096, 512)]
    for i in range(layers):
        p = f"model.layers.{i}."
        rows += [Matrix(f"{p}self_attn.{k}_proj", 512, 512) for k in "qkvo"]
        rows += [
            Matrix(f"{p}mlp.gate_proj", 1024, 512),
            Matrix(f"{p}mlp.up_proj", 1024, 512),
            Matrix(f"{p}mlp.down_proj", 512, 1024),
        ]
    return ModelMatrices(tuple(rows), tied=True)


SPACE = ConfigSpace(big_model(), FORMATS)


@settings(max_examples=60, deadline=None)
@given(st.floats(2.26, 8.0), st.integers(0, 1000))
def test_budgeted_samples_meet_the_budget_and_keep_groups_together(bits, seed):
    config = SPACE.sample(np.random.default_rng(seed), bits)
    assert abs(config.average_bits(SPACE.model) - bits) <= 0.15
    assert all(len({config[name] for name in group}) == 1 for group in SPACE.groups)


def test_budgeted_samples_differ_and_reach_the_extremes():
    rng = np.random.default_rng(0)
    assert len({SPACE.sample(rng, 4.0).hash for _ in range(20)}) == 20
    assert SPACE.sample(rng, 0) == SPACE.uniform("nf2-g64")
    assert SPACE.sample(rng, 99) == SPACE.uniform("int8")
