"""A running session changes configuration: what it computes then is what a fresh decoder of that bundle computes."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coatrt.adapter.adapter import Adapter
from coatrt.bundle import Bundle
from coatrt.devices.profiles import device_profile
from coatrt.engines.bundles.options import BundleOptions
from coatrt.engines.bundles.targets import Target
from coatrt.engines.runtime.decoder import Decoder
from coatrt.engines.runtime.load import load_decoder
from coatrt.engines.runtime.lora_file import load_lora
from coatrt.engines.runtime.options import RuntimeOptions
from coatrt.engines.runtime.switch import SwitchingDecoder
from coatrt.errors import BuildError, BundleError, ConfigError
from support.bundles import build_targets


@pytest.fixture(scope="module")
def bundles(tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    adapter, place = Adapter.from_pretrained(tiny_adapter), tmp_path_factory.mktemp("switch")
    targets = [
        Target(device_profile("cpu"), adapter.description.space.uniform(text), place / text)
        for text in ("int8", "nf3-g32")
    ]
    made = build_targets(adapter, adapter.checkpoint(), targets, BundleOptions(context=64))
    return {row.target.output.name: row.bundle for row in made}


@pytest.mark.parametrize("cache_size", [1, 2])
def test_a_switched_session_is_a_fresh_one(bundles: dict[str, Bundle], cache_size: int) -> None:
    session = SwitchingDecoder(bundles, options=RuntimeOptions(context=64), cache_size=cache_size)
    prompt = [5, 9, 2, 7]
    for name in ("nf3-g32", "int8", "nf3-g32"):
        switched = session.switch(name)
        assert (switched.name, session.current) == (name, name)
        assert switched.emit_seconds > 0
        fresh = load_decoder(bundles[name], RuntimeOptions(context=64))
        fresh.set_lora(load_lora(bundles[name].path("lora.safetensors"), bundles[name].contract))
        np.testing.assert_allclose(session.prefill([prompt]), fresh.prefill([prompt]), atol=1e-5)
        np.testing.assert_allclose(session.decode([3]), fresh.decode([3]), atol=1e-5)
    assert (session.switch("int8").load_seconds == 0) == (cache_size == 2)


def test_sequences_go_on_through_a_switch(bundles: dict[str, Bundle]) -> None:
    session = SwitchingDecoder(bundles, options=RuntimeOptions(context=64), cache_size=2)
    session.prefill([[5, 9, 2, 7]])
    straight = session.decode([3])
    before = session.lengths
    session.prefill([[5, 9, 2, 7]])
    assert session.switch("nf3-g32").continues
    assert session.lengths.tolist() == [4]
    other = session.decode([3])
    assert not np.allclose(other, straight, atol=1e-3)
    assert session.switch("int8").continues  # the caches come back with the token that nf3 added
    assert session.lengths.tolist() == before.tolist() == [5]
    assert session.switch("int8").continues
    again = session.decode([4])
    assert np.isfinite(again).all()


def test_another_configurations_lora_without_another_graph(bundles: dict[str, Bundle]) -> None:
    session = SwitchingDecoder(bundles, options=RuntimeOptions(context=64))
    own = session.prefill([[1, 2]])
    switched = session.switch("int8", bundles["nf3-g32"].config)
    assert switched.load_seconds == 0
    assert not np.allclose(session.prefill([[1, 2]]), own, atol=1e-4)


def test_wrong_switches(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    session = SwitchingDecoder(bundles, options=RuntimeOptions(context=64))
    with pytest.raises(ConfigError, match="unknown bundle 'x'; allowed: int8, nf3-g32"):
        session.switch("x")
    with pytest.raises(ConfigError, match="no bundle to switch to; give at least one"):
        SwitchingDecoder({})
    with pytest.raises(ConfigError, match="cache_size must be at least 1, got 0"):
        SwitchingDecoder(bundles, cache_size=0)
    other = Bundle(bundles["int8"].directory, {**bundles["int8"].manifest, "model": {"fingerprint": "another"}})
    with pytest.raises(BundleError, match="different models"):
        SwitchingDecoder({"a": bundles["int8"], "b": other})


@pytest.mark.parametrize("cache_size", [1, 2])
@pytest.mark.parametrize("failure", ["altered", "untrained", "does not load", "longer"])
def test_a_failed_switch_leaves_the_session_as_it_was(
    bundles: dict[str, Bundle],
    tiny_adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cache_size: int,
    failure: str,
) -> None:
    other, config = bundles["nf3-g32"], None
    if failure == "altered":
        other = Bundle.open(shutil.copytree(other.directory, tmp_path / "altered"))
        data = bytearray((other.directory / "weights.bin").read_bytes())
        data[1234] ^= 1
        (other.directory / "weights.bin").write_bytes(data)
    if failure == "untrained":
        config = Adapter.from_pretrained(tiny_adapter).description.space.uniform("int8-g64")

    def load(bundle: Bundle, options: RuntimeOptions) -> Decoder:
        if bundle is other and failure == "does not load":
            raise BuildError("ONNX Runtime refuses it")
        return load_decoder(bundle, replace(options, context=4) if bundle is other else options)

    monkeypatch.setattr("coatrt.engines.runtime.switch.load_decoder", load)
    session, calm = (
        SwitchingDecoder(
            {"int8": bundles["int8"], "other": other}, options=RuntimeOptions(context=64), cache_size=cache_size
        )
        for _ in "ab"
    )
    for each in (session, calm):
        each.switch("int8", bundles["nf3-g32"].config)  # a LoRA that is not the bundle's own
        each.prefill([[5, 9, 2, 7, 1]])
    for _ in range(2):
        with pytest.raises({"altered": BundleError, "does not load": BuildError}.get(failure, ConfigError)):
            session.switch("other", config)
        assert (session.current, session.lengths.tolist(), session.capacity) == ("int8", calm.lengths.tolist(), 64)
        np.testing.assert_allclose(session.decode([3]), calm.decode([3]), atol=1e-5)
    assert session.switch("int8").continues


def test_a_session_whose_decoder_does_not_come_back_says_so(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = SwitchingDecoder(bundles, options=RuntimeOptions(context=64))

    def load(*_: object, **__: object) -> Decoder:
        raise BuildError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr("coatrt.engines.runtime.switch.load_decoder", load)
        with pytest.raises(BuildError, match="no memory"):
            session.switch("nf3-g32")
    with pytest.raises(ConfigError, match="int8 could not be reloaded after a failed switch; switch to a bundle"):
        session.decode([3])
    assert not session.switch("int8").continues
    assert session.prefill([[1, 2]]).shape == (1, 272)
