"""Where CMake finds the headers that the C++ library is compiled with: prefixes, packages, archives with a hash."""

import hashlib
import os
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A project that says which headers it got, without compiling the library.
PROJECT = """
cmake_minimum_required(VERSION 3.16)
project(headers LANGUAGES CXX)
foreach(place CMAKE_SYSTEM_PATH SYSTEM_ENVIRONMENT_PATH CMAKE_ENVIRONMENT_PATH PACKAGE_REGISTRY)
  set(CMAKE_FIND_USE_${place} OFF)  # nothing of this machine's
endforeach()
find_package(coatrt REQUIRED)
add_executable(headers main.cpp)
target_link_libraries(headers coatrt::nlohmann_json coatrt::onnxruntime)
"""
MAIN = """
#include <iostream>
#include <nlohmann/json.hpp>
#include <onnxruntime_c_api.h>
int main() { std::cout << JSON_FROM << " " << ORT_FROM; }
"""
ALONE = [f"-Dcoatrt_DIR={ROOT / 'engines' / 'cpp'}", "-Dcoatrt_OPENSSL=OFF"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for program in ("cmake", os.environ.get("CXX", "c++")):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    (tmp_path / "CMakeLists.txt").write_text(PROJECT)
    (tmp_path / "main.cpp").write_text(MAIN)
    return tmp_path


def headers(directory: Path, mark: str, json: str = "include", ort: str = "include/onnxruntime") -> Path:
    """Put headers that say `mark` into a directory."""
    for path, name in ((f"{json}/nlohmann/json.hpp", "JSON_FROM"), (f"{ort}/onnxruntime_c_api.h", "ORT_FROM")):
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text(f'#define {name} "{mark}"\n')
    return directory


def archives(directory: Path) -> list[str]:
    """Pack headers as the two projects pack their releases; return the options that name them."""
    source = headers(directory / "source", "archive", ort="onnxruntime-1/include")
    with zipfile.ZipFile(directory / "include.zip", "w") as packed:
        packed.writestr("LICENSE.MIT", "")
        for folder in ("include", "single_include"):
            packed.write(source / "include/nlohmann/json.hpp", f"{folder}/nlohmann/json.hpp")
    with tarfile.open(directory / "onnxruntime.tgz", "w:gz") as packed_tar:
        packed_tar.add(source / "onnxruntime-1", "onnxruntime-1")
    options = []
    for kind, path in (("JSON", directory / "include.zip"), ("ORT", directory / "onnxruntime.tgz")):
        options.append(f"-Dcoatrt_{kind}_URL=file://{path}")
        options.append(f"-Dcoatrt_{kind}_SHA256={hashlib.sha256(path.read_bytes()).hexdigest()}")
    return options


def configure(project: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    command = ["cmake", "-S", str(project), "-B", str(project / "build"), *ALONE, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def found(project: Path, *options: str) -> str:
    """Return which headers a program is compiled with."""
    done = configure(project, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    subprocess.run(["cmake", "--build", str(project / "build")], check=True, capture_output=True)
    return subprocess.run([project / "build" / "headers"], check=True, capture_output=True, text=True).stdout


def refusal(project: Path, *options: str) -> str:
    done = configure(project, *options)
    assert done.returncode != 0
    return " ".join(done.stderr.split())


@pytest.mark.parametrize("ort", ["include", "include/onnxruntime", "include/onnxruntime/core/session"])
def test_a_prefix_comes_before_a_download(project: Path, ort: str) -> None:
    prefix = headers(project / "prefix", "prefix", ort=ort)
    assert found(project, *archives(project), f"-DCMAKE_PREFIX_PATH={prefix}") == "prefix prefix"


def test_cmake_packages_are_found_and_their_library_is_not_linked(project: Path) -> None:
    """As Conan writes them: no prefix, a package for each, include directories as generator expressions."""
    store = headers(project / "store", "package", json="json/headers", ort="ort/headers")
    options = ["-DCMAKE_BUILD_TYPE=Release", "-Dcoatrt_FETCH_HEADERS=OFF"]
    for name, folder in (("nlohmann_json", "json"), ("onnxruntime", "ort")):
        config = store / "cmake" / f"{name}-config.cmake"
        config.parent.mkdir(exist_ok=True)
        config.write_text(
            f"add_library({name}::{name} INTERFACE IMPORTED)\n"
            f"set_target_properties({name}::{name} PROPERTIES INTERFACE_LINK_LIBRARIES /no/such/library.so\n"
            f'  INTERFACE_INCLUDE_DIRECTORIES "$<$<CONFIG:Release>:{store / folder / "headers"}>")\n'
        )
        options.append(f"-D{name}_DIR={config.parent}")
    assert found(project, *options) == "package package"


def test_archives_are_fetched_by_their_hash(project: Path) -> None:
    options = archives(project)
    assert found(project, *options) == "archive archive"
    assert found(project, *options, "-DFETCHCONTENT_FULLY_DISCONNECTED=ON") == "archive archive"
    shutil.rmtree(project / "build")
    said = refusal(project, *options, f"-Dcoatrt_ORT_SHA256={'0' * 64}")
    assert "hash" in said.lower() and "0" * 64 in said


def test_directories_stand_in_for_archives_where_there_is_no_network(project: Path) -> None:
    source = headers(project / "copy", "copy", ort="include")
    copies = [f"-DFETCHCONTENT_SOURCE_DIR_{name}={source}" for name in ("NLOHMANN_JSON", "ONNXRUNTIME_HEADERS")]
    assert found(project, *copies, "-DFETCHCONTENT_FULLY_DISCONNECTED=ON") == "copy copy"


def test_nothing_is_fetched_where_that_is_forbidden(project: Path) -> None:
    options = [*archives(project), "-Dcoatrt_FETCH_HEADERS=OFF"]
    said = refusal(project, *options)
    assert (
        "nlohmann/json.hpp is not found; install nlohmann-json, or name its directory in CMAKE_PREFIX_PATH, or set "
        "coatrt_FETCH_HEADERS=ON" in said
    )
    prefix = headers(project / "prefix", "prefix", ort="elsewhere")
    assert "onnxruntime_c_api.h is not found; install" in refusal(project, *options, f"-DCMAKE_PREFIX_PATH={prefix}")
    assert not (project / "build" / "_deps").exists()


def test_an_unknown_component_is_refused(project: Path) -> None:
    text = PROJECT.replace("REQUIRED", "REQUIRED COMPONENTS onnx")
    (project / "CMakeLists.txt").write_text(text)
    assert "no component onnx; allowed: ort, trt, sign, c" in refusal(project)
