"""Signatures in C++: the same are accepted and refused as in Python, in the same words."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coatrt.bundle import SIGNATURE, Bundle
from coatrt.errors import BundleError
from support.keys import write_keys
from support.seals import alter_sealed


def _envelope(path: Path, change: Callable[[Any], object]) -> None:
    bundle = json.loads(path.read_text())
    change(bundle["dsseEnvelope"])
    path.write_text(json.dumps(bundle))


CHANGES: dict[str, Callable[[Path], object]] = {
    "manifest": lambda d: alter_sealed(d / "manifest.json", lambda m: m.update(coatrt="0")),
    "none": lambda d: (d / SIGNATURE).unlink(),
    "garbage": lambda d: (d / SIGNATURE).write_text("{}"),
    "another signature": lambda d: _envelope(d / SIGNATURE, lambda e: e["signatures"][0].update(sig="AAAA")),
    "no base64": lambda d: _envelope(d / SIGNATURE, lambda e: e["signatures"][0].update(sig="A*==")),
    "padding alone": lambda d: _envelope(d / SIGNATURE, lambda e: e.update(payload="====")),
    "another type": lambda d: _envelope(d / SIGNATURE, lambda e: e.update(payloadType="text/plain")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_signature_is_required_in_pythons_words(cpp: Any, tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    keys = write_keys(tmp_path / "keys")
    if keys is None:
        pytest.skip("needs the sign extra")
    directory = Path(shutil.copytree(tiny_bundle, tmp_path / "b"))
    Bundle.open(directory).sign(keys[0])
    done = cpp.run("signed", directory, keys[1])
    if "built without OpenSSL" in done.stderr:
        pytest.skip("needs OpenSSL's headers")
    assert (done.returncode, done.stderr) == (0, "")
    CHANGES[name](directory)
    with pytest.raises(BundleError) as error:
        Bundle.open(directory, key=keys[1])
    refused = cpp.run("signed", directory, keys[1])
    assert (refused.returncode, refused.stderr) == (2, f"{error.value}\n")
    assert "not a usable public key: " in cpp.run("signed", directory, keys[0]).stderr
