"""Options out of range are refused in one line."""

from typing import Any

import pytest

from coatrt.engines.genai.options import GenaiOptions
from coatrt.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"provider": "tpu"}, "provider must be one of cpu, cuda, got 'tpu'"),
        ({"lora": "maybe"}, "lora must be one of on, off, got 'maybe'"),
        ({"accuracy_level": 2}, "accuracy_level must be one of 0, 1, 4, got 2"),
        ({"accuracy_level": True}, "accuracy_level must be one of 0, 1, 4, got True"),
        ({"max_length": 0}, "max_length must be a whole number of at least 1, got 0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        GenaiOptions(**options)
