"""A bundle of the tiny adapter, without an engine."""

from pathlib import Path

import pytest

from coatrt.adapter import Adapter
from coatrt.devices import device
from coatrt.engines.assemble import BundleOptions, assemble
from coatrt.plan import plan_for


@pytest.fixture(scope="session")
def tiny_bundle(tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    adapter = Adapter.load(tiny_adapter)
    profile = device("rtx-4090")
    plan = plan_for(adapter, profile, bits=5.2, context=96, prefill=32)
    directory = tmp_path_factory.mktemp("bundle") / "rtx-4090"
    options = BundleOptions(context=96, engine=False)
    assemble(adapter, adapter.checkpoint(), plan.config, profile, directory, options, plan=plan)
    return directory
