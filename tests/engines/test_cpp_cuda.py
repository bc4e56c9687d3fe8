"""The C++ library's CUDA backend: on the CPU against Python's, and over stand-ins for the driver and ONNX Runtime."""

import itertools
import json
import os
import random
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from coatrt.bundle import Bundle
from coatrt.configs.config import ConfigPatterns, QuantConfig
from coatrt.engines.runtime.cuda import CudaDecoder
from coatrt.engines.runtime.cuda_memory import check_memory, device_weights
from coatrt.engines.runtime.emitter import Emitter
from coatrt.engines.runtime.generate import generate
from coatrt.engines.runtime.lora_file import load_lora
from coatrt.engines.runtime.memory import aligned
from coatrt.engines.runtime.options import RuntimeOptions
from coatrt.engines.runtime.packed_lora import LoraLayout
from coatrt.errors import BuildError
from support.cpp_service import Service
from support.seals import alter_sealed

PROMPT = [10, 200, 30, 44, 5, 66, 77]
CONFIGURATIONS = [{"default": name} for name in ("int8", "int4-g32", "nf3-g32")]
FORMATS = ("fp16", "bf16", "int8", "int8-g128", "int4-g32", "int4-g128", "fp8", "nvfp4", "nf2-g64", "nf8-g16",
           "nf3-g32-dq3-fp16-64", "nf4-g16-dq8-fp32-256", "nf2-g64-dq2-bf16-16")  # fmt: skip
ON_CPU = {"prompt": PROMPT, "context": 64, "backend": "cuda", "provider": "cpu"}
ON_GPU = {"prompt": PROMPT, "context": 64, "backend": "cuda"}


@pytest.fixture(scope="module")
def python(tiny_bundle: Path) -> CudaDecoder:
    return CudaDecoder.of(Bundle.open(tiny_bundle), RuntimeOptions(backend="cuda", context=64), provider="cpu")


def lora_of(bundle: Bundle, kind: str) -> Any:
    if kind == "none":
        return None
    if kind == "own":
        return load_lora(bundle.path("lora.safetensors"), bundle.contract)
    return Emitter.of(bundle).emit(QuantConfig.uniform(bundle.model_matrices, kind))


@pytest.mark.parametrize("kind", ["own", "none", "nf3-g32"])
def test_tokens_and_logits_equal_pythons(cpp: Any, tiny_bundle: Path, python: CudaDecoder, kind: str) -> None:
    bundle = Bundle.open(tiny_bundle)
    python.set_lora(lora_of(bundle, kind))
    request = ON_CPU | {"tokens": 40, "steps": 6, "lora": kind != "none"}
    found = cpp.probe("run", tiny_bundle, json.dumps(request | lora_request(kind)))
    expected = generate(python, [PROMPT], max_tokens=40, stop=bundle.manifest["model"]["stop_tokens"])[0]
    assert (tuple(found["tokens"]), found["reason"]) == (expected.tokens, expected.reason)
    logits = python.prefill([PROMPT])[0]
    for row in found["logits"]:
        assert np.array_equal(np.array(row, np.float32), logits)
        token = int(logits.argmax())
        python.decode([token])
        logits = python.decode([token])[0]
    assert found["capacity"] == python.capacity == 64


def lora_request(kind: str) -> dict[str, Any]:
    return {} if kind in ("own", "none") else {"configuration": {"default": kind}}


class Pretended:
    """A machine with a GPU, as far as the library can tell; what it asked the driver and ONNX Runtime, line by line."""

    def __init__(self, cpp: Any, log: Path) -> None:
        self.cpp, self.log = cpp, log
        self.environment = {
            "LD_LIBRARY_PATH": str(cpp.directory / "driver"),
            "COATRT_ONNXRUNTIME": str(cpp.directory / "libonnxruntime_cuda.so"),
            "COATRT_STUB_REAL": cpp.environment["COATRT_ONNXRUNTIME"],
            "COATRT_STUB_LOG": str(log),
        }

    def run(
        self, command: str, bundle: Path, request: dict[str, Any], **environment: str
    ) -> tuple[Any, str, list[str]]:
        """Return the answer, what was said on standard error, and the log."""
        self.log.unlink(missing_ok=True)
        done = self.cpp.run("probe", command, bundle, json.dumps(request), **self.environment | environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr, self.log.read_text().splitlines()

    def refusal(self, bundle: Path, **environment: str) -> str:
        """Return the one line with which it is refused."""
        found = self.environment | environment
        done = self.cpp.run("probe", "run", bundle, json.dumps(ON_GPU), **found)
        assert done.returncode == 2, (done.returncode, done.stderr[-2000:])
        (line,) = done.stderr.splitlines()
        return line


@pytest.fixture
def gpu(cpp: Any, tmp_path: Path) -> Pretended:
    return Pretended(cpp, tmp_path / "log")


def test_a_step_is_one_write_one_run_one_read_and_one_wait(gpu: Pretended, cpp: Any, tiny_bundle: Path) -> None:
    answer, said, log = gpu.run("run", tiny_bundle, ON_GPU | {"tokens": 8, "steps": 3})
    expected = cpp.probe("run", tiny_bundle, json.dumps(ON_CPU | {"tokens": 8, "steps": 3}))
    # A replayed step is told of all slots, and the graph's answer does not depend on that.
    assert answer == expected
    bundle = Bundle.open(tiny_bundle)
    note = device_weights(bundle.config, bundle.model_matrices).note
    assert said == (f"coatrt: {note}\n" if note else "")
    (stream,) = (line.split()[1] for line in log if line.startswith("stream"))
    assert f"option user_compute_stream={stream}" in log
    (options,) = (line for line in log if line.startswith("options"))
    assert options.split()[1:] == [
        "arena_extend_strategy=kSameAsRequested", "device_id=0", "enable_cuda_graph=1",
        "enable_skip_layer_norm_strict_mode=1", "use_tf32=0",
    ]  # fmt: skip
    assert log[0] == "mode 2"  # before anything is allocated
    first = next(i for i, line in enumerate(log) if line.startswith("run")) - 1
    steps = [step.split("\n") for step in "\n".join(log[first:]).split("\nsynchronize\n")][:-1]
    on_device = "disable_synchronize_execution_providers=1 gpu_graph_id="
    prefills = [step for step in steps if f"run {on_device}-1" in step]
    decodes = [step for step in steps if f"run {on_device}1" in step]
    # Two prompts, and steps: two for each row of logits, then one for each token but the last.
    fed = 2 * 3 + len(answer["tokens"]) - (answer["reason"] == "length")
    assert (len(prefills), len(decodes), len(steps)) == (2, fed, 2 + fed)
    width = 4 * bundle.decoder("cuda")[1].vocabulary
    for step in decodes:
        assert [line.split()[0] for line in step] == ["write", "run", "read"]
        assert [int(line.split()[2]) for line in (step[0], step[2])] == [3 * 256 + 8, width]
    assert len({tuple(step) for step in decodes}) == 1  # the same addresses, whatever the length
    allocated = [line.split()[1] for line in log if line.startswith("allocate")]
    assert sorted(allocated) == sorted(line.split()[1] for line in log if line.startswith("free"))


def test_a_switch_is_one_copy_to_where_the_lora_lies(gpu: Pretended, tiny_bundle: Path) -> None:
    _, _, log = gpu.run("run", tiny_bundle, ON_GPU | {"tokens": 2, "configuration": {"default": "int8"}})
    before = log[: next(i for i, line in enumerate(log) if line.startswith("run")) - 1]
    writes = [line for line in before if line.startswith("write")]
    assert len(writes) == 2  # the bundle's own, then that of the configuration
    assert len(set(writes)) == 1


def test_sessions_share_weights_and_have_graphs_of_their_own(gpu: Pretended, cpp: Any, tiny_bundle: Path) -> None:
    for seed in range(20):  # a prompt that tells the configurations apart
        given = {"prompt": random.Random(seed).choices(range(3, 250), k=7), "tokens": 24}
        expected = [
            cpp.probe("run", tiny_bundle, json.dumps(ON_CPU | given | {"configuration": one}))["tokens"]
            for one in CONFIGURATIONS
        ]
        if len({tuple(tokens) for tokens in expected}) > 1:
            break
    assert len({tuple(tokens) for tokens in expected}) > 1
    request = ON_GPU | given | {"configurations": CONFIGURATIONS}
    answer, _, log = gpu.run("share", tiny_bundle, request)
    assert answer["tokens"] == answer["again"] == expected
    assert log.count("session cuda.onnx") == 1
    numbers = {line.split("gpu_graph_id=")[1] for line in log if "gpu_graph_id" in line}
    assert numbers == {"-1", "1", "2", "3"}  # sessions that came later took the places of closed ones
    assert len([line for line in log if line.startswith("allocate")]) % 3 == 0
    allocated = [line.split()[1] for line in log if line.startswith("allocate")]
    assert sorted(allocated) == sorted(line.split()[1] for line in log if line.startswith("free"))
    # On the CPU as well: a session adds caches, LoRA and logits, not weights.
    answer = cpp.probe("share", tiny_bundle, json.dumps(request | {"provider": "cpu"}))
    assert answer["tokens"] == answer["again"] == expected


def test_the_service_runs_on_it(gpu: Pretended, cpp: Any, tiny_bundle: Path) -> None:
    pretended = SimpleNamespace(directory=cpp.directory, environment=cpp.environment | gpu.environment)
    service = Service(pretended, tiny_bundle, "--backend", "cuda", "--sessions", "2", "--context", "64", wait=False)
    assert service.process.stderr is not None
    line = next(line for line in service.process.stderr if line.startswith("listening"))
    service.port = int(line.rsplit(":", 1)[1])
    request = {"prompt": PROMPT, "max_tokens": 24, "ignore_eos": False}
    found: dict[int, Any] = {}

    def ask(number: int) -> None:
        found[number] = service.complete(**request, configuration=CONFIGURATIONS[number % 3])["text"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    service.stop()
    tokenizer = Bundle.open(tiny_bundle).tokenizer()
    for number, one in enumerate(CONFIGURATIONS):
        answer = cpp.probe("run", tiny_bundle, json.dumps(ON_CPU | {"tokens": 24, "configuration": one}))
        assert found[number] == found[number + 3] == tokenizer.decode(answer["tokens"], skip_special_tokens=True)
    assert gpu.log.read_text().splitlines().count("session cuda.onnx") == 1


def test_a_graph_that_is_not_captured_runs_and_is_told(gpu: Pretended, tiny_bundle: Path) -> None:
    answer, said, log = gpu.run("run", tiny_bundle, ON_GPU | {"tokens": 8}, COATRT_STUB_PROVIDER="uncaptured")
    assert said.splitlines()[0].startswith(
        "coatrt: decoding is slower: cuda.onnx cannot be captured as a CUDA graph (ONNX Runtime refuses"
    )
    assert [" enable_cuda_graph=0 " in line for line in log if line.startswith("options")] == [False, True]
    assert not any("gpu_graph_id=1" in line for line in log)
    request = ON_GPU | {"tokens": 8, "provider_options": {"enable_cuda_graph": "0"}}
    plain, said, log = gpu.run("run", tiny_bundle, request)
    assert plain == answer
    assert "captured" not in said
    assert not any("gpu_graph_id=1" in line for line in log)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"LD_LIBRARY_PATH": ""}, "no NVIDIA driver here (libcuda.so.1 is missing); run the bundle with --backend ort"),
        ({"COATRT_STUB_START": "100"}, "no NVIDIA GPU here; run the bundle with --backend ort"),
        ({"COATRT_STUB_DEVICES": "0"}, "no NVIDIA GPU here; run the bundle with --backend ort"),
        (
            {"COATRT_STUB_START": "803"},
            "the NVIDIA driver does not start (error 803); reinstall it, or run the bundle with --backend ort",
        ),
        (
            {"COATRT_STUB_SM": "100"},
            "this GPU is SM100, onnxruntime-gpu has code for SM75, SM80, SM86, SM89, SM90, SM120; "
            "run with --backend ort",
        ),
        (
            {"COATRT_STUB_PROVIDER": "missing"},
            "the CUDA provider of ONNX Runtime does not load (libcublasLt.so.13 is missing); install it, or run the "
            "bundle with --backend ort",
        ),
    ],
)
def test_a_machine_that_cannot_run_it_is_refused_in_one_line(
    gpu: Pretended, tiny_bundle: Path, facts: dict[str, str], said: str
) -> None:
    if facts == {"LD_LIBRARY_PATH": ""} and shutil.which("nvidia-smi"):
        pytest.skip("a driver is here")
    assert gpu.refusal(tiny_bundle, **facts) == said


def test_cudas_libraries_are_taken_from_pips_packages(gpu: Pretended, tiny_bundle: Path, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "onnxruntime" / "capi", tmp_path / "nvidia" / "cu13" / "lib"
    for folder in (ours, theirs):
        folder.mkdir(parents=True)
    shutil.copy(gpu.environment["COATRT_ONNXRUNTIME"], ours / "libonnxruntime.so.1")
    shutil.copy(gpu.cpp.directory / "libcudart.so", theirs / "libcudart.so.13")
    place = {"COATRT_ONNXRUNTIME": str(ours / "libonnxruntime.so.1")}
    _, _, log = gpu.run("run", tiny_bundle, ON_GPU | {"tokens": 1}, **place)
    assert log.count("cudart") == 1
    assert log.index("cudart") < log.index("session cuda.onnx")


def test_bytes_on_the_gpu_equal_pythons(cpp: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle, path = Bundle.open(tiny_bundle), tmp_path / "c.json"
    names = bundle.model_matrices.names
    mixed = dict(zip(names, itertools.cycle(FORMATS), strict=False))
    for value in [*({"default": name} for name in FORMATS), {"matrices": mixed, "default": "int8"}]:
        path.write_text(json.dumps(value))
        config = ConfigPatterns.from_json(value).resolve(bundle.model_matrices)
        expected = device_weights(config, bundle.model_matrices)
        assert cpp.probe("weights", tiny_bundle, path) == {"bytes": expected.nbytes, "note": expected.note}


def test_memory_is_looked_at_before_anything_is_loaded(gpu: Pretended, tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    io = bundle.decoder("cuda")[1]
    weights = device_weights(bundle.config, bundle.model_matrices)
    caches = aligned(io.kv_heads * 64 * io.head_dim * 2) * len(io.past_names)
    other = LoraLayout(bundle.contract, np.dtype(np.float16)).nbytes + io.vocabulary * 4
    needed = weights.nbytes + caches + other + (256 << 20)

    class Small:
        def memory(self) -> tuple[int, int]:
            return needed - 1, 80 << 30

    with pytest.raises(BuildError) as error:
        advice = "use a shorter --context or a smaller batch"
        check_memory(Small(), weights.nbytes, caches, other, 64, 1, advice)  # type: ignore[arg-type]
    assert gpu.refusal(tiny_bundle, COATRT_STUB_FREE=str(needed - 1)) == str(error.value)
    _, said, _ = gpu.run("run", tiny_bundle, ON_GPU, COATRT_STUB_FREE=str(needed))
    assert said == (f"coatrt: {weights.note}\n" if weights.note else "")


def test_onnx_runtime_without_cuda_and_a_bundle_without_the_graph(
    gpu: Pretended, tiny_bundle: Path, tmp_path: Path
) -> None:
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        real = {"COATRT_ONNXRUNTIME": gpu.environment["COATRT_STUB_REAL"]}
        assert gpu.refusal(tiny_bundle, **real) == (
            f"onnxruntime {ort.__version__} here is built without CUDA; install onnxruntime-gpu in its place, "
            "or run the bundle with --backend ort"
        )
    directory = Path(shutil.copytree(tiny_bundle, tmp_path / "b"))
    alter_sealed(directory / "manifest.json", lambda m: m["decoders"].pop("cuda"))
    assert gpu.refusal(directory) == f"{directory} has no cuda graph, only cpu, engine; build it again"


def test_options_that_do_not_go_together_are_refused(cpp: Any, tiny_bundle: Path) -> None:
    for request, said in (
        ({"backend": "cuda", "provider": "TensorrtExecutionProvider"}, "for backend cuda; leave it empty"),
        ({"backend": "cuda", "provider": "cpu", "context": 0}, "batch 1 and context 0 are given; give at least 1"),
        ({"backend": "ort", "provider": "CUDAExecutionProvider"}, "host memory; use backend cuda"),
        ({"backend": "gpu"}, "backend 'gpu' is given; allowed: ort, cuda, trt"),
    ):
        assert said in cpp.refusal("run", tiny_bundle, json.dumps({"prompt": PROMPT} | request))


@pytest.mark.parametrize("lie", ["layers", "kv_heads", "vocabulary", "activations"])
def test_lies_about_the_graph_are_refused(cpp: Any, tiny_bundle: Path, tmp_path: Path, lie: str) -> None:
    directory = Path(shutil.copytree(tiny_bundle, tmp_path / "b"))
    value = {"layers": 3, "kv_heads": 7, "vocabulary": 10_000, "activations": "float32"}[lie]
    alter_sealed(directory / "manifest.json", lambda m: m["decoders"]["cuda"]["io"].update({lie: value}))
    said = cpp.refusal("run", directory, json.dumps(ON_CPU))
    assert ("has no input past_key_values.2.key" if lie == "layers" else "ONNX Runtime fails") in said
    assert os.linesep not in said
