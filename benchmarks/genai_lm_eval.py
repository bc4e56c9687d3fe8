"""Loss per token of rows of tokens, by lm-eval's own backend for onnxruntime-genai.

python benchmarks/genai_lm_eval.py DIRECTORY ROWS.json    (DIRECTORY: coatrt export --format genai --all-logits)

Prints JSON. It runs in the Python that lm-eval is installed in (pip install lm-eval==0.4.13 onnxruntime-genai
transformers), and needs nothing of coatrt.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

__all__ = ["main"]


def main(directory: str, rows: list[list[int]]) -> dict[str, object]:
    """Return the sum of the losses, their number and the version; each row is scored after its first token."""
    from lm_eval.models.onnxruntime_genai import ONNXRuntimeGenAILM

    model = ONNXRuntimeGenAILM(pretrained=directory)
    scored = model._loglikelihood_tokens([(None, row[:1], row[1:]) for row in rows], disable_tqdm=True)
    losses = [-float(likelihood) for likelihood, _ in scored]
    tokens = sum(len(row) - 1 for row in rows)
    return {"loss": sum(losses) / tokens, "tokens": tokens, "lm_eval": importlib.metadata.version("lm-eval")}


if __name__ == "__main__":
    result = main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
    print(json.dumps(result))
