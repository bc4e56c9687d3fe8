"""`coatrt bench`."""

from pathlib import Path

import click

from coatrt.cli.common import check_writable, echo_json

__all__ = ["command"]


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", "prompts", type=int, multiple=True, help="Prompt length in tokens; repeatable. [16, 128]")
@click.option("--tokens", type=int, default=32, show_default=True, help="Tokens decoded per repetition.")
@click.option("--repeat", type=int, default=5, show_default=True)
@click.option("--batch", type=int, default=1, show_default=True)
@click.option("--threads", type=int, help="Threads; default: all usable cores.")
@click.option(
    "--accuracy-level",
    type=click.Choice(["0", "1", "4"]),
    default="4",
    show_default=True,
    help="Of int4 and int8 products: 0 decoded at load, 1 packed, 4 packed, inexact.",
)
@click.option("--device", help="Profile of this machine, for its bandwidth.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the JSON here too.")
def command(
    bundle: Path,
    prompts: tuple[int, ...],
    tokens: int,
    repeat: int,
    batch: int,
    threads: int | None,
    accuracy_level: str,
    device: str | None,
    as_json: bool,
    output: Path | None,
) -> None:
    """Measure BUNDLE on this machine with ONNX Runtime: prefill, decode, LoRA on and off, emission, load."""
    from coatrt.bundle import Bundle
    from coatrt.cli.progress import drawn
    from coatrt.devices.profiles import device as profile
    from coatrt.engines.measure.bench import bench, bench_text
    from coatrt.system.files import write_json

    if output is not None:
        check_writable(output)
    known = profile(device) if device is not None else None
    with drawn("bench") as progress:
        result = bench(
            Bundle.open(bundle),
            prompts=prompts or (16, 128),
            tokens=tokens,
            repeat=repeat,
            batch=batch,
            threads=threads,
            accuracy_level=int(accuracy_level),
            device=known,
            progress=progress,
        )
    if output is not None:
        write_json(output, result)
    if as_json:
        echo_json(result)
    else:
        click.echo(bench_text(result))
