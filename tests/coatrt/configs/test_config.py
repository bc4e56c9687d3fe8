import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coatrt.configs.config import ConfigPatterns, QuantConfig, matching_names
from coatrt.errors import CheckpointError, ConfigError, FormatError
from coatrt.models.matrices import ModelMatrices, matrices_of
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.json_data import convert, to_data

pytestmark = pytest.mark.fast


def shapes(layers=2, tied=True):
    out = {"model.embed_tokens.weight": (100, 64), "model.norm.weight": (64,)}
    for i in range(layers):
        p = f"model.layers.{i}."
        for name, shape in {
            "self_attn.q_proj": (64, 64),
            "self_attn.k_proj": (32, 64),
            "self_attn.v_proj": (32, 64),
            "self_attn.o_proj": (64, 64),
            "mlp.gate_proj": (128, 64),
            "mlp.up_proj": (128, 64),
            "mlp.down_proj": (64, 128),
        }.items():
            out[f"{p}{name}.weight"] = shape
        out[f"{p}input_layernorm.weight"] = (64,)
    if not tied:
        out["lm_head.weight"] = (100, 64)
    return out


MODEL = matrices_of(shapes(), tied=True)


def test_inventory_of_a_checkpoint():
    assert len(MODEL.matrices) == 15 and len(matrices_of(shapes(tied=False), False).matrices) == 16
    assert MODEL.names[0] == "model.embed_tokens" and MODEL.other_bytes == 2 * 64 * 3
    assert len(matrices_of({**shapes(), "lm_head.weight": (100, 64)}, True).matrices) == 15  # a tied table counts once
    assert [len(g) for g in MODEL.groups] == [1, 3, 1, 2, 1, 3, 1, 2, 1]
    assert sorted(name for group in MODEL.groups for name in group) == sorted(MODEL.names)
    assert convert(to_data(MODEL), ModelMatrices, "matrices", "") == MODEL
    with pytest.raises(CheckpointError, match=r"model\.layers"):
        matrices_of({"encoder.weight": (3, 3)}, True)


def test_exact_name_beats_first_pattern_beats_default():
    config = ConfigPatterns.from_json(
        {
            "default": "int8",
            "patterns": {"*.mlp.*": "int4-g64", "*up_proj": "nf2-g64"},
            "matrices": {"model.layers.1.mlp.up_proj": "fp16"},
        }
    ).resolve(MODEL)
    assert str(config["model.layers.1.mlp.up_proj"]) == "fp16"
    assert str(config["model.layers.0.mlp.up_proj"]) == "int4-g64"  # the first pattern that matches
    assert str(config["model.layers.0.self_attn.q_proj"]) == "int8"


@pytest.mark.parametrize(
    "pattern, names",
    [
        ("*layers.[!1]*.[qk]_proj", {f"model.layers.0.self_attn.{kind}_proj" for kind in "qk"}),
        (
            "model.layers.?.mlp.[a-g]*_proj",
            {f"model.layers.{i}.mlp.{k}_proj" for i in (0, 1) for k in ("gate", "down")},
        ),
        ("model.embed_tokens", {"model.embed_tokens"}),
        ("*", set(MODEL.names)),
    ],
)
def test_a_pattern_is_a_glob_over_the_whole_name(pattern, names):
    assert set(matching_names(pattern, MODEL)) == names


@pytest.mark.parametrize("pattern", ["(.*)*(.*)*(.*)*(.*)*x", "*o*o*o*o*o*o*o*o*o*o*o*o*o*o*!", "*" * 5000 + "!"])
def test_no_pattern_takes_long(pattern):
    started = time.perf_counter()
    with pytest.raises(ConfigError, match="matches none of the model's"):
        matching_names(pattern, MODEL)
    assert time.perf_counter() - started < 1


def test_average_bits_by_hand():
    config = ConfigPatterns.from_json({"default": "fp16", "matrices": {"model.embed_tokens": "int4-g64"}}).resolve(
        MODEL
    )
    table, rest = 100 * 64, MODEL.parameters - 100 * 64
    assert config.nbytes(MODEL) == table // 2 + table // 64 * 2 + rest * 2
    assert config.average_bits(MODEL) == pytest.approx((table * 4.25 + rest * 16) / MODEL.parameters)


def test_hash_depends_on_the_formats_only():
    one = QuantConfig.uniform(MODEL, "int8")
    same = QuantConfig(dict(reversed(list(one.formats.items()))))
    assert one == same and one.hash == same.hash and hash(one) == hash(same)
    assert one.hash != QuantConfig.uniform(MODEL, "fp8").hash


@given(st.lists(st.sampled_from(["fp16", "int8", "int4-g64", "nf3-g64-dq4-bf16-256"]), min_size=15, max_size=15))
def test_json_round_trip(formats):
    config = QuantConfig(dict(zip(MODEL.names, map(WeightFormat.parse, formats), strict=True)))
    assert ConfigPatterns.from_json(json.loads(json.dumps(config.to_json()))).resolve(MODEL) == config


@pytest.mark.parametrize(
    "value, message",
    [
        ({"default": "int8", "matrices": {"model.layers.9.mlp.up_proj": "int8"}}, "model.layers.9.mlp.up_proj"),
        ({"default": "int8", "patterns": {"nothing": "int8"}}, "matches none"),
        ({"default": "int8", "patterns": {r".*\.mlp\..*": "int8"}}, "patterns are globs, not regular expressions"),
        ({"matrices": {"model.embed_tokens": "int8"}}, "no format"),
        ({"formats": {}}, "keys"),
        ([], "keys"),
        ({}, "keys"),
        ({"matrices": []}, "object"),
    ],
)
def test_wrong_configurations_are_refused(value, message):
    with pytest.raises(ConfigError, match=message):
        ConfigPatterns.from_json(value).resolve(MODEL)


def test_unknown_format_names_the_place():
    with pytest.raises(FormatError, match=r"default.*int3"):
        ConfigPatterns.from_json({"default": "int3"})


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        QuantConfig.load(tmp_path / "none.json", MODEL)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        QuantConfig.load(tmp_path / "bad.json", MODEL)
    QuantConfig.uniform(MODEL, "int8").save(tmp_path / "good.json")
    assert QuantConfig.load(tmp_path / "good.json", MODEL) == QuantConfig.uniform(MODEL, "int8")
