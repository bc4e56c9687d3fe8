"""`coatrt plan`."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coatrt.cli.common import BYTES, JSON, PATH, TARGETS, check_writable, echo_json, with_options

if TYPE_CHECKING:
    from coatrt.planning.plan import Plan, PlanRequest

__all__ = ["command", "plan_options", "plan_request", "plans_text"]


class _Pin(click.ParamType[tuple[str, str]]):
    name = "matrix=format"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        pattern, sign, text = str(value).rpartition("=")
        if not (sign and pattern and text):
            self.fail(f"{value!r} is no pin; give MATRIX=FORMAT, like lm_head=int8 or '*down_proj=int8'", param, ctx)
        return pattern, text


plan_options = with_options(
    click.option("--memory", type=BYTES, help="Bytes the engine may use, like 6GiB; default: the device's memory."),
    click.option("--bits", type=float, help="Cap on average bits per weight."),
    click.option(
        "--objective", type=click.Choice(["quality", "latency", "balanced"]), default="quality", show_default=True
    ),
    click.option(
        "--max-loss",
        type=float,
        help="Cap on the predicted loss increase, nats per token; default: none, 0.05 for latency.",
    ),
    click.option("--min-tokens-per-second", type=float, help="Of a sequence at decode, predicted."),
    click.option(
        "--keep",
        type=_Pin(),
        multiple=True,
        help="MATRIX=FORMAT: a name, a kind like down_proj, or a glob like *.mlp.*; repeatable.",
    ),
    click.option("--context", type=int, default=2048, show_default=True, help="Slots of the KV cache per sequence."),
    click.option("--batch", type=int, default=1, show_default=True, help="Sequences at once."),
    click.option("--prefill", type=int, default=512, show_default=True, help="Most prompt tokens in one call."),
)
"""Adds the options that plan, build and report share."""


def plan_request(choices: dict[str, Any]) -> "PlanRequest":
    """Return the request that the options of `plan_options` mean, taking them out of `choices`."""
    from coatrt.planning.plan import PlanRequest

    return PlanRequest(**{field.name: choices.pop(field.name) for field in fields(PlanRequest)})


def plans_text(plans: "Sequence[Plan]") -> str:
    """Return few plans in full, many as a table."""
    from coatrt.planning.plan import fleet_table

    return fleet_table(plans) if len(plans) > 2 else "\n\n".join(plan.text() for plan in plans)


@click.command()
@click.argument("adapter", type=PATH)
@TARGETS
@plan_options
@click.option("-o", "--output", type=PATH, help="Write the plan here (one device).")
@JSON
def command(adapter: Path, devices: tuple[str, ...], output: Path | None, as_json: bool, **choices: Any) -> None:
    """Choose a configuration of ADAPTER per device: least predicted loss, least time per token, or balanced."""
    from coatrt.adapter.description import AdapterDescription
    from coatrt.cli.progress import drawn_progress
    from coatrt.devices.profiles import device_profile
    from coatrt.errors import ConfigError
    from coatrt.planning.archive import adapter_archive
    from coatrt.planning.planner import plan_fleet
    from coatrt.system.json_data import write_json

    request = plan_request(choices)
    profiles = [device_profile(name) for name in dict.fromkeys(devices)]
    if output is not None:
        check_writable(output)
        if len(profiles) > 1:
            raise ConfigError(f"-o takes one device, {len(profiles)} are given; give one, or --json")
    with drawn_progress("plan"):
        plans = plan_fleet(AdapterDescription.load(adapter), profiles, request, archive=adapter_archive(adapter))
    if output is not None:
        write_json(output, plans[0].to_json())
    if as_json:
        echo_json([plan.to_json() for plan in plans] if len(plans) > 1 else plans[0].to_json())
    else:
        click.echo(plans_text(plans))
