"""What a decoder computes, written into an adapter and read back without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from coatrt.errors import CheckpointError
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.spec import DecoderSpec
from coatrt.system.json_data import convert, to_data
from support.families import MODELS, tiny_config


@pytest.mark.parametrize("name", MODELS)
def test_it_comes_back_from_its_json(name: str) -> None:
    spec = DecoderSpec.from_config(tiny_config(name).to_dict())
    assert convert(to_data(spec), DecoderSpec, "decoder", "") == spec


@pytest.mark.parametrize(
    ("field", "value"),
    [("layers", "3"), ("layers", True), ("epsilon", None), ("windows", 5), ("activation", None), ("layer_norm", 1)],
)
def test_fields_of_other_types_are_refused(tiny_llama: Path, field: str, value: object) -> None:
    written = to_data(DecoderSpec.from_config(Checkpoint.open(tiny_llama).config))
    with pytest.raises(CheckpointError, match=rf"the decoder is garbled \(.* - at `\$\.{field}`\); train again"):
        convert({**written, field: value}, DecoderSpec, "the decoder", "train again", CheckpointError)


def test_reading_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, coatrt.models.spec, coatrt.adapter.description, coatrt.planning.planner\n"
    code += "assert not {'torch', 'transformers', 'scipy', 'onnx'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
