"""Bundle → decoder: which runtime, which file of the bundle."""

from coatrt.bundle import Bundle
from coatrt.engines.runtime.decoder import Decoder
from coatrt.engines.runtime.ort import OrtDecoder
from coatrt.errors import BuildError

__all__ = ["check_decoder", "load_decoder"]


def load_decoder(
    bundle: Bundle,
    backend: str = "ort",
    *,
    batch: int = 1,
    context: int = 2048,
    threads: int | None = None,
    accuracy_level: int = 4,
) -> Decoder:
    """Return a decoder of a bundle with no LoRA bound; every file is hashed before it is read.

    Args:
        bundle: an opened bundle.
        backend: "ort" for ONNX Runtime on the CPU, "trt" for the bundle's engine on this machine's GPU.
        batch: sequences at once.
        context: slots of the caches (ort; an engine's are fixed).
        threads: of the session (ort).
        accuracy_level: see `coatrt.engines.runtime.ort.session` (ort); 4 is what plans for the CPU assume, 0 is exact.

    Raises:
        BuildError: the backend is unknown, cannot run here, or the bundle has nothing for it.
    """
    if backend == "ort":
        graph, io = bundle.decoder("cpu")
        return OrtDecoder(
            graph, io, bundle.contract, batch=batch, context=context, threads=threads, accuracy_level=accuracy_level
        )
    if backend == "trt":
        from coatrt.engines.runtime.trt import TrtDecoder

        return TrtDecoder.of(bundle, batch=batch)
    raise BuildError(f"backend {backend!r} is given; allowed: ort, trt")


def check_decoder(bundle: Bundle, backend: str) -> None:
    """Check the hash of every file that `load_decoder` reads, or may read, before any of them is loaded.

    Raises:
        BundleError: a file was altered, or the bundle has no such graph.
    """
    bundle.decoder("cpu" if backend == "ort" else "engine")
    for name in ("lora_io.json", *(engine["file"] for engine in bundle.manifest["engines"] if backend == "trt")):
        bundle.path(name)
