"""`coatrt adapt`."""

from pathlib import Path

import click

__all__ = ["command"]


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--config", "config_path", type=click.Path(path_type=Path), help="Configuration; default: the bundle's own."
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="File (peft: directory) to write.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["safetensors", "peft", "onnx-adapter"]),
    default="safetensors",
    show_default=True,
)
def command(bundle: Path, config_path: Path | None, output: Path, kind: str) -> None:
    """Emit the LoRA of a configuration with BUNDLE's hypernetwork: no torch, no base model."""
    import time

    from coatrt.bundle import Bundle
    from coatrt.configs.config import QuantConfig
    from coatrt.engines.bundles.lora_formats import write_emitted_peft, write_onnx_adapter
    from coatrt.engines.runtime.emitter import Emitter, save_lora
    from coatrt.errors import ConfigError

    opened = Bundle.open(bundle)
    config = QuantConfig.load(config_path, opened.model_matrices) if config_path is not None else opened.config
    if output.is_dir() and any(output.iterdir()):
        raise ConfigError(f"{output} is a directory that holds files; give a new path")
    emitter = Emitter.of(opened)
    started = time.perf_counter()
    tensors = emitter.emit(config)
    milliseconds = (time.perf_counter() - started) * 1e3
    if kind == "peft":
        write_emitted_peft(output, tensors, emitter.contract, str(opened.manifest["model"]["source"]))
    elif kind == "onnx-adapter":
        write_onnx_adapter(output, tensors)
    else:
        save_lora(output, tensors, config)
    click.echo(f"{output}: LoRA of {config.hash}, {len(tensors)} tensors, emitted in {milliseconds:.1f} ms")
