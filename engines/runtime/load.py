"""Bundle → decoder: picks the runtime and the bundle's files for a backend."""

from dataclasses import replace
from typing import Any

from coatrt.bundle import Bundle
from coatrt.engines.runtime.decoder import CachedDecoder, Decoder
from coatrt.engines.runtime.options import Backend, RuntimeOptions
from coatrt.engines.runtime.ort import OrtDecoder

__all__ = ["check_decoder", "load_decoder"]

_FORMS: dict[Backend, str] = {"ort": "cpu", "trt": "engine", "cuda": "cuda"}


def load_decoder(bundle: Bundle, options: RuntimeOptions = RuntimeOptions(), **changes: Any) -> Decoder:
    """Return a decoder of a bundle with no LoRA bound; the hash of every file is checked before it is read.

    Args:
        bundle: an opened bundle.
        options: how it runs.
        changes: fields of `RuntimeOptions` that override `options`, such as context=4096.

    Raises:
        BuildError: the backend cannot run here, or the bundle has no graph or engine for it.
        BundleError: a file of the bundle was altered.
    """
    options = replace(options, **changes)
    if options.backend == "ort":
        graph, io = bundle.decoder("cpu")
        decoder: CachedDecoder = OrtDecoder(graph, io, bundle.contract, options)
    elif options.backend == "cuda":
        from coatrt.engines.runtime.cuda import CudaDecoder

        decoder = CudaDecoder.of(bundle, options)
    else:
        from coatrt.engines.runtime.trt import TrtDecoder

        decoder = TrtDecoder.of(bundle, options)
    decoder.configuration, decoder.strict_lora = bundle.manifest["configuration"]["hash"], options.strict_lora
    return decoder


def check_decoder(bundle: Bundle, backend: Backend) -> None:
    """Check the hash of every file that `load_decoder` may read, without loading any of them.

    Raises:
        BundleError: a file was altered, or the bundle has no such graph.
    """
    bundle.decoder(_FORMS[backend])
    for name in ("lora_io.json", *(engine["file"] for engine in bundle.manifest["engines"] if backend == "trt")):
        bundle.path(name)
