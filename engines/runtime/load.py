"""Bundle → decoder: which runtime, which file of the bundle."""

from dataclasses import replace
from typing import Any

from coatrt.bundle import Bundle
from coatrt.engines.runtime.decoder import CachedDecoder, Decoder
from coatrt.engines.runtime.options import Backend, RuntimeOptions
from coatrt.engines.runtime.ort import OrtDecoder

__all__ = ["check_decoder", "load_decoder"]

_FORMS: dict[Backend, str] = {"ort": "cpu", "trt": "engine", "cuda": "cuda"}


def load_decoder(bundle: Bundle, options: RuntimeOptions = RuntimeOptions(), **changes: Any) -> Decoder:
    """Return a decoder of a bundle with no LoRA bound; every file is hashed before it is read.

    Args:
        bundle: an opened bundle.
        options: how it runs.
        changes: fields of `RuntimeOptions` that differ from `options`, such as context=4096.

    Raises:
        BuildError: the backend cannot run here, or the bundle has nothing for it.
    """
    options = replace(options, **changes)
    if options.backend == "ort":
        graph, io = bundle.decoder("cpu")
        made: CachedDecoder = OrtDecoder(graph, io, bundle.contract, options)
    elif options.backend == "cuda":
        from coatrt.engines.runtime.cuda import CudaDecoder

        made = CudaDecoder.of(bundle, options)
    else:
        from coatrt.engines.runtime.trt import TrtDecoder

        made = TrtDecoder.of(bundle, options)
    made.configuration, made.strict_lora = bundle.manifest["configuration"]["hash"], options.strict_lora
    return made


def check_decoder(bundle: Bundle, backend: Backend) -> None:
    """Check the hash of every file that `load_decoder` reads, or may read, before any of them is loaded.

    Raises:
        BundleError: a file was altered, or the bundle has no such graph.
    """
    bundle.decoder(_FORMS[backend])
    for name in ("lora_io.json", *(engine["file"] for engine in bundle.manifest["engines"] if backend == "trt")):
        bundle.path(name)
