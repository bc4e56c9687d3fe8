"""`coatrt bench`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coatrt.cli.common import JSON, PATH, check_writable, echo_json, runtime_options, trust_options
from coatrt.cli.help import documented

if TYPE_CHECKING:
    from coatrt.bundle import SignaturePolicy

__all__ = ["command"]


@documented(
    examples=(
        "coatrt bench bundles/l4",
        "coatrt bench bundles/l4 -p 128 -p 512 -n 64 -r 10",
        "coatrt bench bundles/l4 --backend cuda --profile l4 -o bench.json",
    ),
    first=(
        *("prompts", "tokens", "repeat", "backend", "batch", "threads", "accuracy_level", "device"),
        *("as_json", "output"),
    ),
)
@click.argument("bundle", type=PATH)
@click.option(
    "-p",
    "--prompt",
    "prompts",
    type=int,
    multiple=True,
    default=(16, 128),
    help="Prompt length in tokens; repeatable.",
)
@click.option("-n", "--tokens", type=int, default=32, help="Tokens to decode in each repetition.")
@click.option("-r", "--repeat", type=int, default=5, help="Repetitions.")
@runtime_options("backend", "batch", "threads", "accuracy_level")
@click.option(
    "--profile", "device", metavar="DEVICE", help="Compare with the bandwidth of this device (see coatrt devices)."
)
@trust_options
@JSON
@click.option("-o", "--output", type=PATH, help="Write the JSON to this file; coatrt report reads BUNDLE.bench.json.")
def command(
    bundle: Path,
    prompts: tuple[int, ...],
    tokens: int,
    repeat: int,
    device: str | None,
    key: Path | None,
    signature: "SignaturePolicy | None",
    as_json: bool,
    output: Path | None,
    **runtime: Any,
) -> None:
    """Measure a bundle on this machine: prefill, decode, LoRA switch.

    Each is measured with the LoRA and without. BUNDLE is a directory that coatrt build or export wrote.
    """
    from coatrt.bundle import Bundle
    from coatrt.cli.progress import drawn_progress
    from coatrt.devices.profiles import device_profile as profile
    from coatrt.engines.measure.bench import bench, bench_text
    from coatrt.engines.runtime.options import RuntimeOptions
    from coatrt.system.json_data import write_json

    if output is not None:
        check_writable(output)
    known = profile(device) if device is not None else None
    opened = Bundle.open(bundle, key=key, policy=signature)
    with drawn_progress("bench") as progress:
        result = bench(
            opened,
            RuntimeOptions(**runtime),
            prompts=prompts,
            tokens=tokens,
            repeat=repeat,
            device=known,
            progress=progress,
        )
    try:
        if output is not None:
            write_json(output, result)
    finally:  # a result that cannot be written is printed
        if as_json:
            echo_json(result)
        else:
            click.echo(bench_text(result))
