"""What the TensorRT decoder says where something is missing, does not fit, or fails: one line, nothing beside it."""

import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coatrt.bundle import Bundle
from coatrt.engines.runtime.cuda_driver import CudaDriver
from coatrt.engines.runtime.decoder import LoraTensors
from coatrt.engines.runtime.trt import TrtDecoder
from coatrt.engines.runtime.trt_engine import TrtEngine
from coatrt.errors import BuildError, BundleError
from support.fake_tensorrt import VERSION, add_engine
from support.trt_machine import (
    LAUNCH,
    PROMPTS,
    Machine,
    assert_near,
    install,
    loaded,
    reference,
)


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        ({"capturable": False}, "TensorRT does not allow it"),
        ({"refuses_capture": True}, "operation not permitted when stream is capturing"),
        ("cuStreamBeginCapture_v2", "cuStreamBeginCapture_v2: error 801"),
        ("cuStreamEndCapture", "cuStreamEndCapture: error 801"),
        ("cuGraphInstantiateWithFlags", "cuGraphInstantiateWithFlags: error 801"),
    ],
)
def test_a_step_that_is_not_captured_runs_plainly_and_says_so_once(
    machine: Machine,
    bundle: Bundle,
    lora: LoraTensors,
    capsys: pytest.CaptureFixture[str],
    failure: Any,
    said: str,
) -> None:
    decoder, other = loaded(bundle), reference(bundle)
    if isinstance(failure, str):
        machine.driver.fails[failure] = 801
    else:
        vars(machine.tensorrt).update(failure)
    for each in (decoder, other):
        each.set_lora(lora)
    for _ in range(2):
        assert_near(decoder.prefill(PROMPTS), other.prefill(PROMPTS))
        for tokens in ([5, 6], [7, 8], [9, 10]):
            assert_near(decoder.decode(tokens), other.decode(tokens))
    line = f"coatrt: decoding is slower: the engine cannot be captured as a CUDA graph ({said})\n"
    assert capsys.readouterr().err == line
    assert (machine.driver.calls[LAUNCH], machine.driver.graphs) == (0, {})
    tried = {"cuStreamBeginCapture_v2", "cuStreamEndCapture"} & set(machine.driver.calls)
    assert all(machine.driver.calls[name] == 1 for name in tried)


@pytest.mark.parametrize(
    ("facts", "batch", "said"),
    [
        ({"start": 100}, 1, "no NVIDIA GPU here; run the bundle with --backend ort"),
        ({"gpus": 0}, 1, "no NVIDIA GPU here; run the bundle with --backend ort"),
        ({"start": 803}, 1, r"the NVIDIA driver does not start \(error 803\)"),
        ({"sm": 120}, 1, "the bundle has engines for SM89, this GPU is SM120; build a bundle for it"),
        ({}, 3, "batch must be at most 2 with this engine, got 3; build the bundle with a larger --batch"),
        (
            {"free": 1 << 20},
            1,
            r"not enough GPU memory: 0\.27 GB needed .* use a smaller batch, or build the bundle with a shorter",
        ),
    ],
)
def test_a_machine_that_cannot_run_it_is_refused_in_one_line(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any], batch: int, said: str
) -> None:
    install(Machine(**facts), monkeypatch)
    with pytest.raises(BuildError, match=said) as error:
        loaded(bundle, batch)
    assert "\n" not in str(error.value)


def test_another_tensorrt_or_none_is_refused_with_both_values(
    machine: Machine, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", types.SimpleNamespace(__version__="1.0"))  # type: ignore[arg-type]
    with pytest.raises(
        BuildError, match=rf"needs tensorrt-rtx {VERSION}, installed is 1\.0; engines do not load across"
    ):
        loaded(bundle)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)  # type: ignore[arg-type]
    with pytest.raises(BuildError, match=r"needs tensorrt-rtx.*'\.\[rtx\]' .*; or use --backend ort"):
        loaded(bundle)


def test_what_tensorrt_says_is_in_the_line(
    machine: Machine, bundle: Bundle, tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BuildError, match=r"does not load \(magicTag == kEXPECTED_MAGIC_TAG failed\): it was built for"):
        loaded(add_engine(tiny_bundle, tmp_path / "b", plan=b"not an engine"))
    machine.tensorrt.no_context = True
    with pytest.raises(
        BuildError, match=r"cannot create an execution context \(TensorRT gives no reason\); free memory"
    ):
        loaded(bundle)
    machine.tensorrt.no_context = False
    decoder = loaded(bundle)
    machine.tensorrt.fails = True
    with pytest.raises(BuildError, match=r"fails in a step of 4 tokens \(the first reason\); use a smaller batch"):
        decoder.prefill(PROMPTS)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("change", [{"kv_heads": 4}, {"vocabulary": 300}, {"layers": 3}, {"activations": "float32"}])
def test_an_engine_that_is_not_the_manifests_is_refused(
    machine: Machine, bundle: Bundle, change: dict[str, Any]
) -> None:
    io, driver = bundle.decoder("engine")[1], CudaDriver(machine.driver)
    plan = bundle.path("sm.engine").read_bytes()
    with pytest.raises(BuildError, match=r"the engine and the manifest differ in \S+; build the bundle again"):
        TrtDecoder(machine.tensorrt, plan, replace(io, **change), bundle.contract, 2, 4, driver)


def test_the_real_library_refuses_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    tensorrt = pytest.importorskip("tensorrt_rtx")
    with pytest.raises(
        BuildError, match=r"the engine does not load \(.*Serialization.*\): it was built for another TensorRT"
    ):
        TrtEngine(tensorrt, b"no engine" * 100)
    assert capfd.readouterr() == ("", "")
    for name in ("get_tensor_name", "get_tensor_shape", "get_tensor_dtype", "num_io_tensors", "device_memory_size_v2"):
        assert hasattr(tensorrt.ICudaEngine, name)
    for name in ("set_device_memory", "set_tensor_address", "set_input_shape", "execute_async_v3"):
        assert hasattr(tensorrt.IExecutionContext, name)
    assert tuple(tensorrt.Dims([1, -1])) == (1, -1)
    assert {"FLOAT", "HALF", "BF16", "INT64"} <= set(dir(tensorrt.DataType))
    assert hasattr(tensorrt.ExecutionContextAllocationStrategy, "USER_MANAGED")
    assert hasattr(tensorrt.DynamicShapesKernelSpecializationStrategy, "EAGER")


def test_a_missing_engine_file_or_an_altered_one_is_not_read(machine: Machine, bundle: Bundle, tmp_path: Path) -> None:
    place = Path(shutil.copytree(bundle.directory, tmp_path / "b"))
    (place / "sm.engine").write_bytes(b"another engine!.onnx")
    with pytest.raises(BundleError, match=r"sm\.engine"):
        loaded(Bundle.open(place))
