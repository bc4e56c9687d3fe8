"""Plans: what fits, what binds, every byte recomputed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coatrt.adapter.description import AdapterDescription
from coatrt.configs.config import QuantConfig
from coatrt.configs.space import ConfigSpace
from coatrt.devices.profiles import device_profile, device_profiles
from coatrt.errors import ConfigError, DeviceError
from coatrt.planning import planner
from coatrt.planning.archive import Archive, ArchiveEntry
from coatrt.planning.memory import RUNTIME_RESERVE
from coatrt.planning.plan import Plan
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.json_data import write_json
from support.tiny import lora_elements

MIB = 1 << 20


@pytest.fixture(scope="module")
def adapter(tiny_adapter: Path) -> AdapterDescription:
    return AdapterDescription.load(tiny_adapter)


def test_memory_is_the_sum_of_what_is_there(adapter: AdapterDescription) -> None:
    plan = planner.plan(adapter, device_profile("rtx-3060"), bits=5.0, context=100, batch=3, prefill=7)
    lora = 2 * lora_elements(adapter.model)
    codes = sum(plan.config[m.name].bits * m.N * m.K // 8 for m in adapter.model.matrices)
    assert plan.memory_bytes["weights"] == codes
    assert plan.memory_bytes["scales"] == plan.config.nbytes(adapter.model) - codes
    assert plan.memory_bytes["LoRA"] == lora
    assert (
        plan.memory_bytes["KV cache"] == 2 * 2 * 2 * 2 * 16 * 100 * 3
    )  # bytes, K and V, layers, heads, width, slots, batch
    assert plan.memory_bytes["activations"] == 2 * 3 * (7 * (6 * 64 + 3 * 160) + 272)
    assert plan.memory_bytes["runtime"] == RUNTIME_RESERVE
    assert plan.memory_bytes["other tensors"] == adapter.model.other_bytes == 2 * 64 * 5  # five norms
    read = sum(plan.memory_bytes[name] for name in ("weights", "scales", "LoRA", "KV cache", "other tensors"))
    assert plan.bytes_per_token == read
    assert plan.tokens_per_second_bound == pytest.approx(360e9 / read)
    assert plan.average_bits <= 5.0
    assert plan.binds == "--bits 5"
    loss = sum(adapter.sensitivity.costs[name][str(fmt)] for name, fmt in plan.config.formats.items())
    assert plan.predicted_loss_increase == pytest.approx(loss)


@pytest.mark.parametrize("name", [profile.id for profile in device_profiles()])
def test_no_plan_has_a_format_the_device_lacks(adapter: AdapterDescription, name: str) -> None:
    profile = device_profile(name)
    plan = planner.plan(adapter, profile, bits=5.0)
    assert all(profile.supports(fmt) for fmt in plan.config.formats.values())
    assert plan.device == name


@settings(max_examples=15, deadline=None)
@given(st.floats(3.6, 8.2), st.floats(3.6, 8.2))
def test_a_tighter_budget_never_has_more_bytes_nor_less_loss(
    adapter: AdapterDescription, first: float, second: float
) -> None:
    low, high = (planner.plan(adapter, device_profile("rtx-5090"), bits=bits) for bits in sorted((first, second)))
    assert low.memory_bytes["weights"] <= sorted((first, second))[0] * adapter.model.parameters / 8
    assert low.predicted_loss_increase >= high.predicted_loss_increase * (1 - 1e-3)


def test_memory_binds_and_what_does_not_fit_says_what_would(adapter: AdapterDescription) -> None:
    rich = planner.plan(adapter, device_profile("rtx-3060"))
    assert rich.binds == "everything fits"
    assert rich.config.counts == {"int8": 15}
    spare = sum(rich.memory_bytes.values()) - 20_000
    tight = planner.plan(adapter, device_profile("rtx-3060"), memory=spare)
    assert tight.binds == "memory"
    assert sum(tight.memory_bytes.values()) <= spare
    assert tight.memory_bytes["weights"] < rich.memory_bytes["weights"]
    with pytest.raises(
        ConfigError, match=r"not enough memory on rtx-3060: the model needs at least 51\d MiB .* is 100 MiB"
    ):
        planner.plan(adapter, device_profile("rtx-3060"), memory=100 * MIB)
    with pytest.raises(ConfigError, match=r"--bits must be at least .* on rtx-3060, got 2;"):
        planner.plan(adapter, device_profile("rtx-3060"), bits=2)
    for wrong in ({"context": 0}, {"batch": 0}, {"prefill": -1}):
        with pytest.raises(ConfigError, match=r"must be at least 1 and at most \d+, got (0|-1)"):
            planner.plan(adapter, device_profile("rtx-3060"), **wrong)


def test_latency_takes_the_least_time_within_a_loss(adapter: AdapterDescription) -> None:
    exact = planner.plan(adapter, device_profile("rtx-3060"), objective="latency", max_loss=1e9)
    assert exact.config.counts == {"int4-g32": 15}  # NormalFloat is smaller and is charged for its unpacking
    quality = planner.plan(adapter, device_profile("rtx-3060"), bits=5.0)
    bound = quality.predicted_loss_increase
    plan = planner.plan(adapter, device_profile("rtx-3060"), objective="latency", max_loss=bound)
    assert plan.predicted_loss_increase <= bound * (1 + 1e-6)
    assert plan.decode_seconds is not None
    assert quality.decode_seconds is not None
    assert exact.decode_seconds is not None
    assert exact.decode_seconds < plan.decode_seconds <= quality.decode_seconds
    with pytest.raises(ConfigError, match="is not feasible"):
        planner.plan(adapter, device_profile("rtx-3060"), objective="latency", max_loss=0.0)


def test_a_device_with_none_of_the_formats_is_refused(adapter: AdapterDescription) -> None:
    space = ConfigSpace(adapter.model, (WeightFormat.parse("fp8"), WeightFormat.parse("nvfp4")))
    with pytest.raises(DeviceError, match=r"t4 supports none of the adapter's formats \(fp8, nvfp4\)"):
        planner.plan(replace(adapter, space=space), device_profile("t4"))


def test_a_printed_plan_gives_the_same_configuration_again(adapter: AdapterDescription, tmp_path: Path) -> None:
    plan: Plan = planner.plan(adapter, device_profile("rtx-4090"), bits=4.7)
    written = plan.to_json()
    write_json(tmp_path / "config.json", written["configuration"])
    again = QuantConfig.load(tmp_path / "config.json", adapter.model)
    assert again == plan.config
    assert again.hash == written["configuration_hash"]
    assert written["average_bits"] == again.average_bits(adapter.model)
    assert "rtx-4090" in plan.text()
    assert again.hash in plan.text()


def test_a_measured_configuration_is_taken_where_it_measured_better(adapter: AdapterDescription) -> None:
    free = planner.plan(adapter, device_profile("rtx-4090"), bits=5.0)
    low, odd = (planner.plan(adapter, device_profile("rtx-4090"), bits=bits).config for bits in (4.4, 4.8))
    high = planner.plan(adapter, device_profile("rtx-4090"), bits=6.0).config

    def chosen(*losses: tuple[QuantConfig, float], **changes: Any) -> Plan:
        archive = Archive(adapter.model.parameters)
        for config, loss in losses:
            archive.add(ArchiveEntry(config, config.nbytes(adapter.model) + 10, loss))
        return planner.plan(adapter, device_profile("rtx-4090"), bits=5.0, archive=archive, **changes)

    assert chosen() == free
    assert free.measured_loss is None
    better = chosen((low, 2.0), (odd, 3.0), (high, 1.0))  # high does not fit, odd is nearest to the allocation
    assert (better.config, better.measured_loss) == (low, 2.0)
    assert "measured loss  2.0000" in better.text()
    assert better.memory_bytes["weights"] + better.memory_bytes["scales"] == low.nbytes(adapter.model)
    assert (
        chosen((low, 3.0), (odd, 2.0), (high, 1.0)).config == free.config
    )  # the nearest is the best: no reason to move
    itself = chosen((free.config, 2.0), (low, 2.5))
    assert (itself.config, itself.measured_loss) == (free.config, 2.0)
    latency = {"objective": "latency", "max_loss": free.predicted_loss_increase}
    expected = planner.plan(adapter, device_profile("rtx-4090"), bits=5.0, **latency)
    assert chosen((low, 2.0), (odd, 3.0), **latency).config == expected.config


def test_formats_the_device_lacks_are_not_taken_from_the_archive(adapter: AdapterDescription) -> None:
    archive = Archive(adapter.model.parameters)
    for text, loss in (("nvfp4", 1.0), ("int8", 2.0)):
        config = adapter.space.uniform(text)
        archive.add(ArchiveEntry(config, config.nbytes(adapter.model), loss))
    assert planner.plan(adapter, device_profile("rtx-3060"), archive=archive).config.counts == {"int8": 15}
    assert planner.plan(adapter, device_profile("rtx-5090"), archive=archive).config.counts == {"nvfp4": 15}
