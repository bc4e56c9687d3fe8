"""Profiles and the real builder agree on every format at every edge; failures of the builder are one line."""

from pathlib import Path

import pytest

from coatrt.configs.config import QuantConfig
from coatrt.configs.lora_contract import contract_for
from coatrt.devices.profiles import DeviceProfile, device_profile
from coatrt.engines.builders import builder
from coatrt.engines.builders.builder import EngineShapes, build_engine, check_formats, installed_builder
from coatrt.errors import BuildError, DeviceError, FormatError
from coatrt.export.decoder import GraphForm, export_decoder
from coatrt.models.checkpoint import Checkpoint
from coatrt.system.json_data import to_data

rtx = pytest.mark.rtx
DEVICES = {75: "t4", 80: "a100-80gb", 86: "rtx-3060", 89: "rtx-4090", 120: "rtx-5090", 121: "dgx-spark"}
FORMATS = ("fp16", "int8", "int8-g32", "int4-g32", "fp8", "nvfp4", "nf2-g32", "nf3-g16", "nf4-g32", "nf8-g32")


@pytest.fixture(scope="module")
def graphs(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory per format with base.onnx."""
    root = tmp_path_factory.mktemp("graphs")
    checkpoint = Checkpoint.open(tiny_llama)
    form, contract = GraphForm("engine", "base.onnx", "float16", 64), contract_for(checkpoint.matrices, 16, 32)
    for text in FORMATS:
        (root / text).mkdir()
        config = QuantConfig.uniform(checkpoint.matrices, text)
        export_decoder(checkpoint, config, root / text, forms=[form], contract=contract)
    return root


@rtx
@pytest.mark.parametrize("sm", [sm if sm in (75, 120) else pytest.param(sm, marks=pytest.mark.slow) for sm in DEVICES])
def test_profile_and_builder_agree(graphs: Path, tiny_llama: Path, tmp_path: Path, sm: int) -> None:
    pytest.importorskip("tensorrt_rtx")
    profile, model = device_profile(DEVICES[sm]), Checkpoint.open(tiny_llama).matrices
    assert profile.sm == sm
    for text in FORMATS:
        allowed = True
        try:
            check_formats(QuantConfig.uniform(model, text), profile)
        except FormatError:
            allowed = False
        try:
            record = build_engine(graphs / text / "base.onnx", tmp_path / f"{text}.engine", profile)
            built = record.bytes > 0
        except BuildError:
            built = False
            assert not (tmp_path / f"{text}.engine").exists()
        assert built == allowed, f"{text} on SM{sm}: the profile says {allowed}, the builder {built}"


@rtx
def test_one_engine_serves_several_gpus(graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "coatrt").mkdir()  # as in a checkout, where the parts of the package lie elsewhere
    (tmp_path / "coatrt" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    record = build_engine(
        graphs / "int4-g32" / "base.onnx",
        tmp_path / "e.engine",
        device_profile("rtx-3060"),
        also=[device_profile("rtx-4090"), device_profile("rtx-5090")],
        shapes=EngineShapes(batch=2, prefill=32, logits=4),
    )
    assert record.sms == (86, 89, 120)
    assert record.bytes == (tmp_path / "e.engine").stat().st_size
    assert to_data(record)["shapes"] == {"batch": 2, "prefill": 32, "logits": 4}


def test_formats_are_refused_before_the_builder(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "run_child", lambda *_: pytest.fail("the builder was called"))
    model = Checkpoint.open(tiny_llama).matrices
    with pytest.raises(FormatError, match=r"rtx-3060 \(SM86\) cannot run fp8 .* and 14 more .* needs SM89 or later"):
        check_formats(QuantConfig.uniform(model, "fp8"), device_profile("rtx-3060"))
    with pytest.raises(FormatError, match=r"t4 \(SM75\) cannot run int4-g64"):
        check_formats(QuantConfig.uniform(model, "int4-g64"), device_profile("t4"))
    with pytest.raises(FormatError, match="has no bfloat16"):
        check_formats(QuantConfig.uniform(model, "int8"), device_profile("t4"), "bfloat16")
    check_formats(QuantConfig.uniform(model, "nvfp4"), device_profile("rtx-5090"))


@rtx
def test_a_refusal_names_the_reason_and_leaves_nothing(graphs: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(BuildError, match=r"building e\.engine for SM86 failed: .*fp8"):
        build_engine(graphs / "fp8" / "base.onnx", tmp_path / "e.engine", device_profile("rtx-3060"))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "base.onnx").write_bytes(b"no graph")
    with pytest.raises(BuildError, match="failed"):
        build_engine(tmp_path / "damaged" / "base.onnx", tmp_path / "e.engine", device_profile("rtx-3060"))
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_a_dying_builder_is_one_error(graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def died(*_: object) -> tuple[str, int]:
        return "[E] something native\nSegmentation fault\n", -11

    monkeypatch.setattr(builder, "installed_builder", lambda _: "1.0")
    monkeypatch.setattr(builder, "run_child", died)
    with pytest.raises(BuildError, match=r"something native.*signal 11"):
        build_engine(graphs / "int8" / "base.onnx", tmp_path / "e.engine", device_profile("rtx-3060"))
    assert not any(tmp_path.iterdir())


def test_a_folder_called_as_the_builder_is_no_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt_empty").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(builder._EXTRAS, "tensorrt-empty", "rtx")
    find = builder.importlib.util.find_spec
    monkeypatch.setattr(
        builder.importlib.util, "find_spec", lambda name: find("json" if name == "polygraphy" else name)
    )
    with pytest.raises(BuildError, match="the module tensorrt_empty here has no version; install tensorrt-empty again"):
        installed_builder("tensorrt-empty")


def test_devices_without_a_builder_here(graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BuildError, match="needs no engine; give a GPU"):
        build_engine(graphs / "int8" / "base.onnx", tmp_path / "e.engine", device_profile("cpu"))
    monkeypatch.setattr(builder.importlib.util, "find_spec", lambda _: None)
    line = r"needs tensorrt and polygraphy: pip install '\.\[tensorrt\]' in a checkout of coatrt on the device itself"
    with pytest.raises(BuildError, match=line):
        build_engine(graphs / "int8" / "base.onnx", tmp_path / "e.engine", device_profile("h100"))


def test_regular_tensorrt_takes_the_same_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def worker(request: dict[str, object], what: str, chosen: dict[str, str]) -> None:
        seen.update(request, what=what, chosen=chosen)
        Path(str(request["engine"])).write_bytes(b"engine")

    monkeypatch.setattr(builder, "installed_builder", lambda name: f"{name} 10.14")
    monkeypatch.setattr(builder, "_run_worker", worker)
    profile: DeviceProfile = device_profile("h100")
    monkeypatch.setattr(builder, "probe", lambda: [profile])
    record = build_engine(tmp_path / "base.onnx", tmp_path / "e.engine", profile)
    assert (record.builder, record.version, record.sms, record.bytes) == ("tensorrt", "tensorrt 10.14", (90,), 6)
    assert (seen["builder"], seen["chosen"]) == ("tensorrt", {})
    assert (tmp_path / "e.engine").read_bytes() == b"engine"


def test_regular_tensorrt_needs_a_gpu_of_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []

    def worker(request: dict[str, object], what: str, chosen: dict[str, str]) -> None:
        seen.append(chosen)
        Path(str(request["engine"])).write_bytes(b"engine")

    monkeypatch.setattr(builder, "installed_builder", lambda _: "10.14")
    monkeypatch.setattr(builder, "_run_worker", worker)
    engine, h100, l4, t4 = tmp_path / "e.engine", device_profile("h100"), device_profile("l4"), device_profile("t4")
    for here, said in (
        ([], r"needs a GPU with SM90, this machine has no GPU; build on the device"),
        ([l4, t4, l4], r"needs a GPU with SM90, this machine's GPUs have SM75/89"),
    ):
        monkeypatch.setattr(builder, "probe", lambda here=here: here)
        with pytest.raises(BuildError, match=said):
            build_engine(tmp_path / "base.onnx", engine, h100)
    monkeypatch.setattr(builder, "probe", fail)
    with pytest.raises(BuildError, match="check the NVIDIA driver"):
        build_engine(tmp_path / "base.onnx", engine, h100)
    monkeypatch.setattr(builder, "probe", lambda: [l4, h100])
    with pytest.raises(BuildError, match="builds for one SM, got SM87/90"):
        build_engine(tmp_path / "base.onnx", engine, h100, also=[device_profile("jetson-agx-orin")])
    assert not seen
    assert not engine.exists()
    assert build_engine(tmp_path / "base.onnx", engine, h100).sms == (90,)
    assert seen == [{"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "1"}]


def fail() -> list[DeviceProfile]:
    raise DeviceError("nvidia-smi failed; check the NVIDIA driver")
