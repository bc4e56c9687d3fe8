"""`coatrt bench`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coatrt.cli.common import JSON, PATH, check_writable, echo_json, runtime_options, trust_options

if TYPE_CHECKING:
    from coatrt.bundle import SignaturePolicy

__all__ = ["command"]


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--prompt", "prompts", type=int, multiple=True, help="Prompt length in tokens; repeatable. [16, 128]")
@click.option("--tokens", type=int, default=32, show_default=True, help="Tokens decoded per repetition.")
@click.option("--repeat", type=int, default=5, show_default=True)
@runtime_options("backend", "batch", "threads", "accuracy_level")
@click.option("--profile", "device", help="Device profile of this machine (coatrt devices), for its bandwidth.")
@trust_options
@JSON
@click.option("-o", "--output", type=PATH, help="Write the JSON here too; `coatrt report` reads BUNDLE.bench.json.")
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
    """Measure BUNDLE on this machine: prefill, decode, LoRA on and off, emission, load."""
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
            prompts=prompts or (16, 128),
            tokens=tokens,
            repeat=repeat,
            device=known,
            progress=progress,
        )
    try:
        if output is not None:
            write_json(output, result)
    finally:  # what was measured is shown, kept or not
        if as_json:
            echo_json(result)
        else:
            click.echo(bench_text(result))
