"""`coatrt plan`."""

from pathlib import Path
from typing import Any

import click

from coatrt.cli.common import BYTES, echo_json

__all__ = ["command", "plan_options"]

_OPTIONS = (
    click.option("--memory", type=BYTES, help="Bytes the engine may use, like 6GiB; default: the device's memory."),
    click.option("--bits", type=float, help="Cap on average bits per weight."),
    click.option("--objective", type=click.Choice(["quality", "latency"]), default="quality", show_default=True),
    click.option("--max-loss", type=float, default=0.05, show_default=True, help="For latency: nats per token."),
    click.option("--context", type=int, default=2048, show_default=True, help="Slots of the KV cache per sequence."),
    click.option("--batch", type=int, default=1, show_default=True, help="Sequences at once."),
    click.option("--prefill", type=int, default=512, show_default=True, help="Most prompt tokens in one call."),
)


def plan_options(function: Any) -> Any:
    """Add the options that plan and build share."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@click.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--device", "devices", multiple=True, required=True, help="Device id (coatrt devices); repeatable.")
@plan_options
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the configuration here (one device).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(adapter: Path, devices: tuple[str, ...], output: Path | None, as_json: bool, **choices: Any) -> None:
    """Choose a configuration of ADAPTER for a device: least predicted loss that fits, or fewest bytes within a loss."""
    from coatrt.adapter_facts import AdapterFacts
    from coatrt.archive import adapter_archive
    from coatrt.devices import device
    from coatrt.errors import ConfigError
    from coatrt.plan import plan_for

    if output is not None and len(devices) > 1:
        raise ConfigError(f"-o takes one device, {len(devices)} are given; give one, or --json")
    profiles = [device(name) for name in devices]
    loaded, archive = AdapterFacts.load(adapter), adapter_archive(adapter)
    plans = [
        plan_for(loaded, profile, archive=archive, **choices)
        for profile in profiles
    ]  # fmt: skip
    if output is not None:
        plans[0].config.save(output)
    if as_json:
        echo_json([plan.to_json() for plan in plans] if len(plans) > 1 else plans[0].to_json())
    else:
        click.echo("\n\n".join(plan.text() for plan in plans))
