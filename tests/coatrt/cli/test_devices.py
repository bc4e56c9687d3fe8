"""`coatrt devices`: a line for each device, its formats once for each compute capability."""

from click.testing import CliRunner

from coatrt.cli.main import cli
from coatrt.devices.profiles import device_profiles


def test_formats_are_told_once_and_are_those_of_every_device() -> None:
    shown = CliRunner().invoke(cli, ["devices"]).output
    table, _, formats = shown.partition("\nweight formats\n")
    rows = table.strip().splitlines()
    assert len(rows) == 1 + len(device_profiles())
    assert len(rows[0].split()) == 7
    assert not any(" int8" in row for row in rows)
    lines = [line.split("  ") for line in formats.strip().splitlines()]
    assert len({line[-1] for line in lines}) == len(lines)
    by_place = {place: line[-1].split() for line in lines for place in line[0].split(", ")}
    for profile in device_profiles():
        kinds = by_place[f"SM{profile.sm}" if profile.sm else profile.id]
        assert kinds == [*(kind for kind in profile.kinds if not kind.startswith("nf")), "nf2-8"]


def test_no_device_is_no_traceback() -> None:
    for arguments in (["devices", "probe"], ["devices", "probe", "--json"]):
        result = CliRunner().invoke(cli, arguments, env={"PATH": ""}, catch_exceptions=False)
        assert result.exit_code == 0
        assert result.output.strip() == "[]" or "no NVIDIA GPU here" in result.output
