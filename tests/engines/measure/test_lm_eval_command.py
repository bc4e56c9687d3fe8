"""`coatrt lm-eval` on two local tasks, a multiple choice and perplexity, and lm-eval's own model beside it."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("lm_eval", reason="needs lm-eval, the extra eval")
pytest.importorskip("datasets", reason="needs datasets, the extra eval")

import datasets

from coatrt.cli.main import cli
from coatrt.engines.measure.lm_eval_command import run_lm_eval
from coatrt.errors import ConfigError
from support.decoded import save_decoded

pytestmark = pytest.mark.slow  # lm-eval reads the names of all its tasks at every start

CHOICE = """\
task: coatrt_test_choice
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}} the"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
TEXT = """\
task: coatrt_test_text
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""
GENERATION = """\
task: coatrt_test_generation
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: generate_until
doc_to_text: "{{{{question}}}} the"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 8
metric_list:
  - metric: exact_match
"""
ANIMALS = ("cat", "dog", "hen", "owl")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows: list[Any] = [
        {"question": f"{a} the {a} sat on", "choices": [" mat.", " hat.", " mat. dog"], "answer": 0} for a in ANIMALS
    ]
    texts = [{"text": f"{a} the {a} sat on the mat. " * n} for n, a in enumerate(ANIMALS, 1)]
    for name, data in (("questions", rows), ("texts", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    for name, task, data in (
        ("choice", CHOICE, "questions"),
        ("text", TEXT, "texts"),
        ("generation", GENERATION, "questions"),
    ):
        (folder / f"{name}.yaml").write_text(task.format(data=folder / f"{data}.jsonl"))
    return folder


def scores(folder: Path, tasks: Path, *arguments: str) -> tuple[dict[str, Any], list[Any]]:
    """Return lm-eval's results, and the answers of the model to each request."""
    run_lm_eval(
        [
            *(*arguments, "--include_path", str(tasks), "--batch_size", "3", "--output_path", str(folder)),
            *("--tasks", "coatrt_test_choice,coatrt_test_text,coatrt_test_generation", "--log_samples"),
        ]
    )
    (path,) = folder.rglob("results_*.json")
    answers = []
    for name in ("choice", "text", "generation"):
        (samples,) = folder.rglob(f"samples_coatrt_test_{name}_*.jsonl")
        lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
        answers.append([line["resps"] for line in lines])
    found: dict[str, Any] = json.loads(path.read_text())
    return found, answers


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.mark.usefixtures("offline")
def test_scores_are_those_of_lm_evals_transformers_model(
    tiny_bundle: Path, tiny_llama: Path, tasks: Path, tmp_path: Path
) -> None:
    decoded = save_decoded(tiny_bundle, tiny_llama, tmp_path / "decoded", lora=True)
    hf_args = f"pretrained={decoded},dtype=float32,max_length=96"
    found, answers = scores(
        tmp_path / "ours",
        tasks,
        "--model",
        "coatrt",
        "--model_args",
        f"bundle={tiny_bundle},accuracy_level=1,max_length=96",
    )
    wanted, expected = scores(tmp_path / "theirs", tasks, "--model", "hf", "--device", "cpu", "--model_args", hf_args)
    for one, other in zip(flat(answers), flat(expected), strict=True):
        assert float(one) == pytest.approx(float(other), abs=1e-3) if is_number(one) else one == other
    assert set(found["results"]) == {"coatrt_test_choice", "coatrt_test_text", "coatrt_test_generation"}
    for task, values in found["results"].items():
        for name, value in values.items():
            other = wanted["results"][task][name]
            assert value == (pytest.approx(other, rel=1e-4) if is_number(value) else other), (task, name)
    assert found["config"]["coatrt_lora"] == "own"


def is_number(value: object) -> bool:
    try:
        float(str(value))
    except ValueError:
        return False
    return str(value) not in ("True", "False")


def flat(value: Any) -> list[Any]:
    return [leaf for part in value for leaf in flat(part)] if isinstance(value, list) else [value]


def test_what_is_wrong_is_one_line(tiny_bundle: Path, tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^lm-eval stops: Tasks not found: nonsense; see lm_eval run --help$"):
        run_lm_eval(["--model", "coatrt", "--model_args", f"bundle={tiny_bundle}", "--tasks", "nonsense"])
    arguments = ["--include_path", str(tasks), "--tasks", "coatrt_test_choice"]
    result = CliRunner().invoke(cli, ["lm-eval", "--model", "coatrt", "--model_args", "bundle=absent", *arguments])
    assert str(result.exception).startswith("not a bundle: absent")
    result = CliRunner().invoke(cli, ["lm-eval", "--help"])
    assert result.exit_code == 0 and "Score a bundle on the tasks of lm-eval." in result.output
