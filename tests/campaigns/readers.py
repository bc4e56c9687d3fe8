"""What reads each kind of mutated input, in process."""

import shutil
from collections.abc import Callable
from pathlib import Path

__all__ = [
    "read_adapter",
    "read_bundle",
    "read_choice",
    "read_data",
    "read_lora",
    "read_model",
    "read_report",
    "read_state",
    "read_timings",
    "read_tokenizer",
]


def read_model(path: Path) -> None:
    """Read a checkpoint as training does."""
    from coatrt.models.checkpoint import Checkpoint
    from coatrt.models.config_file import end_tokens
    from coatrt.models.exportable import check_exportable
    from coatrt.models.modules import load_model
    from coatrt.models.spec import DecoderSpec

    checkpoint = Checkpoint.open(path)
    check_exportable(checkpoint, DecoderSpec.from_config(checkpoint.config))
    end_tokens(checkpoint.directory, checkpoint.config)
    _ = checkpoint.fingerprint
    load_model(checkpoint)


def read_tokenizer(path: Path) -> None:
    """Read a tokenizer, encode and decode."""
    from coatrt.engines.runtime.generate import encode_prompt
    from coatrt.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(path)
    encode_prompt(tokenizer, "hé <|end|>")
    encode_prompt(tokenizer, "hé", chat=True, system="x")
    tokenizer.decode([1, 2, 300], skip_special_tokens=True)


def read_data(kind: str) -> Callable[[Path], None]:
    """Return what reads data of a kind."""

    def read(path: Path) -> None:
        from coatrt.data.registry import load_task
        from coatrt.models.tokenizer import load_tokenizer

        load_task(kind, [path], load_tokenizer(path.parent / "model"), 64).check_rows(272)

    return read


def read_choice(path: Path) -> None:
    """Read a configuration, or a plan."""
    from coatrt.adapter.description import AdapterDescription
    from coatrt.planning.plan import read_choice

    config, plan = read_choice(path, AdapterDescription.load(path.parent / "adapter").model)
    _ = config.hash
    if plan is not None:
        plan.text()


def read_adapter(path: Path) -> None:
    """Read an adapter and plan with it."""
    from coatrt.adapter.adapter import Adapter
    from coatrt.adapter.description import AdapterDescription
    from coatrt.devices.profiles import device_profile
    from coatrt.planning.archive import adapter_archive
    from coatrt.planning.plan import PlanRequest
    from coatrt.planning.planner import plan_fleet

    facts = AdapterDescription.load(path)
    devices = [device_profile(name) for name in ("t4", "cpu")]
    plan_fleet(facts, devices, PlanRequest(), archive=adapter_archive(path))[0].text()
    Adapter.from_pretrained(path)


def read_report(path: Path) -> None:
    """Write a report about an adapter or a bundle."""
    from coatrt.reporting.write import report

    report([path], path.parent / "report.html", devices=["t4"])


def read_bundle(path: Path) -> None:
    """Open a bundle, emit its LoRA, and generate."""
    import coatrt
    from coatrt.engines.runtime.emitter import Emitter

    bundle = coatrt.Bundle.open(path)
    Emitter.of(bundle, 1).emit(bundle.config)
    decoder = coatrt.load_decoder(bundle, context=16, threads=1)
    decoder.set_lora(coatrt.load_lora(bundle.path(bundle.manifest.get("lora", "lora.safetensors")), bundle.contract))
    coatrt.generate(decoder, [[1, 2, 3]], max_tokens=2, stop=bundle.manifest["model"]["stop_tokens"])


def read_lora(path: Path) -> None:
    """Read a LoRA for the bundle beside it."""
    import coatrt

    coatrt.load_lora(path, coatrt.Bundle.open(path.parent / "bundle").contract)


def read_timings(path: Path) -> None:
    """Plan with the timings of a file."""
    from coatrt.planning.measured_latency import timings_path

    place = timings_path("cpu")
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, place)
    try:
        read_adapter(path.parent / "adapter")
    finally:
        place.unlink()


def read_state(path: Path) -> None:
    """Read the state of a training."""
    from coatrt.training.resume_state import check_state

    check_state(path, "run")
