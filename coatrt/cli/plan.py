"""`coatrt plan`."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coatrt.cli.common import BYTES, JSON, PATH, TARGETS, check_writable, echo_json, with_options
from coatrt.cli.help import documented

if TYPE_CHECKING:
    from coatrt.planning.plan import PlanRequest

__all__ = ["command", "plan_options", "plan_request"]


class _Pin(click.ParamType[tuple[str, str]]):
    name = "matrix=format"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        pattern, sign, text = str(value).rpartition("=")
        if not (sign and pattern and text):
            self.fail(f"not a pin: {value!r}; give MATRIX=FORMAT, like lm_head=int8 or '*down_proj=int8'", param, ctx)
        return pattern, text


plan_options = with_options(
    click.option("--memory", type=BYTES, help="Memory the model may use, like 6GiB.  [default: the device's]"),
    click.option("--bits", type=float, help="Most bits per weight, averaged over the model."),
    click.option(
        "--objective",
        type=click.Choice(["quality", "latency", "balanced"]),
        default="quality",
        help="Least predicted loss, least time per token, or a balance of both.",
    ),
    click.option(
        "--max-loss",
        type=float,
        help="Largest predicted loss increase, nats per token.  [default: none; for latency 0.05]",
    ),
    click.option("--min-tokens-per-second", type=float, help="Least predicted decode speed of a sequence."),
    click.option(
        "--keep",
        type=_Pin(),
        multiple=True,
        help="Fix the format of a matrix, of a kind (down_proj=int8) or of a glob (*.mlp.*=int8); repeatable. "
        "*=checkpoint keeps the codes of a quantized checkpoint.",
    ),
    click.option("--context", type=int, default=2048, help="Tokens that the KV cache of a sequence holds."),
    click.option("--batch", type=int, default=1, help="Sequences decoded together."),
    click.option("--prefill", type=int, default=512, help="Most prompt tokens in one call."),
)
"""Adds the options that plan, build and report share."""


def plan_request(choices: dict[str, Any]) -> "PlanRequest":
    """Return the request of the options of `plan_options`, which are removed from `choices`."""
    from coatrt.planning.plan import PlanRequest

    return PlanRequest(**{field.name: choices.pop(field.name) for field in fields(PlanRequest)})


@documented(
    examples=(
        "coatrt plan adapter --target rtx-4060 --bits 4.5",
        "coatrt plan adapter --target rtx-4060 --memory 6GiB --keep lm_head=int8",
        "coatrt plan adapter --target t4 --target l4 --target rtx-4090 --bits 5",
        "coatrt plan adapter --target l4 --objective balanced -o plan.json",
    ),
    first=(
        *("devices", "bits", "memory", "objective", "max_loss", "min_tokens_per_second", "context", "batch"),
        *("output", "as_json"),
    ),
)
@click.argument("adapter", type=PATH)
@TARGETS
@plan_options
@click.option("-o", "--output", type=PATH, help="Write the plan of one device to this file, for coatrt build --config.")
@JSON
def command(adapter: Path, devices: tuple[str, ...], output: Path | None, as_json: bool, **choices: Any) -> None:
    """Choose a configuration for each device.

    A configuration is the weight format of every matrix. The best one within the limits is taken; without limits, the
    one of least predicted loss that fits in the device's memory. ADAPTER is a directory that coatrt train wrote.
    """
    from coatrt.adapter.description import AdapterDescription
    from coatrt.cli.progress import drawn_progress
    from coatrt.devices.profiles import device_profile
    from coatrt.errors import ConfigError
    from coatrt.planning.archive import adapter_archive
    from coatrt.planning.planner import plan_fleet
    from coatrt.planning.plans_text import plans_text
    from coatrt.system.json_data import write_json

    request = plan_request(choices)
    profiles = [device_profile(name) for name in dict.fromkeys(devices)]
    if output is not None:
        check_writable(output)
        if len(profiles) > 1:
            raise ConfigError(f"-o takes one --target, got {len(profiles)}; give one, or use --json")
    with drawn_progress("plan"):
        plans = plan_fleet(AdapterDescription.load(adapter), profiles, request, archive=adapter_archive(adapter))
    if output is not None:
        write_json(output, plans[0].to_json())
    if as_json:
        echo_json([plan.to_json() for plan in plans] if len(plans) > 1 else plans[0].to_json())
    else:
        click.echo(plans_text(plans))
