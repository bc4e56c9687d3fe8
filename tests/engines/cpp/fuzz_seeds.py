"""Write the seeds of the fuzz targets, a folder each: python tests/engines/cpp/fuzz_seeds.py DIRECTORY."""

import json
import sys
from pathlib import Path

from coatrt.bundle import BUNDLE_FORMAT

IO = {
    "layers": 2,
    "kv_heads": 2,
    "head_dim": 16,
    "vocabulary": 272,
    "cache_length": None,
    "activations": "float32",
    "max_positions": 96,
}
FILE = {"sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a", "bytes": 2}  # {}
MANIFEST = {
    "format": BUNDLE_FORMAT,
    "coatrt": "0.1.0",
    "model": {"stop_tokens": [2]},
    "configuration": {"file": "a"},
    "matrices": {"matrices": [["model.embed_tokens", 272, 64]]},
    "engines": [],
    "versions": {},
    "lora": "a",
    "decoders": {"cpu": {"file": "a", "weights": "a", "io": IO}},
    "files": {"a": FILE},
}
HEADER = {"__metadata__": {"configuration": "0" * 16}, "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
MATRIX = {"matrix": "m", "A": "a", "B": "b", "K": 2, "N": 2, "rank": 16}
CONTRACT = {"alpha": 32.0, "dtype": "float32", "tensors": [MATRIX]}
TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    "normalizer": {"type": "NFC"},
    "added_tokens": [{"id": 3, "content": "<s>", "special": True}],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True},
}
COMMON = {
    "model": "m",
    "max_tokens": 4,
    "temperature": 0.5,
    "top_k": 2,
    "top_p": 0.9,
    "min_p": 0.1,
    "presence_penalty": 1,
    "frequency_penalty": -1,
    "repetition_penalty": 1.5,
    "logit_bias": {"5": 1},
    "seed": 1,
    "n": 2,
    "stop": ["ce", "e é"],
    "ignore_eos": False,
    "stream": True,
    "stream_options": {"include_usage": True},
    "configuration": {"patterns": {"*.mlp.*": "int8"}, "default": "nf3-g64"},
    "user": "u",
}
REQUEST = {**COMMON, "prompt": ["Once é", [1, 2]], "logprobs": 2}
PARTS = [{"type": "text", "text": "a</think> b"}]
MESSAGES = [{"role": "user", "content": "Once é"}, {"role": "assistant", "content": PARTS}]
CHAT = {**COMMON, "messages": MESSAGES, "logprobs": True, "top_logprobs": 3}


def field(number: int, inside: bytes) -> bytes:
    """Return a field of a protocol buffer that holds bytes, fewer than 128."""
    tag = number << 3 | 2
    return bytes([tag] if tag < 128 else [tag & 127 | 128, tag >> 7]) + bytes([len(inside)]) + inside


def graph() -> bytes:
    """Return an ONNX model with tensors in every place that holds one."""
    tensor = field(13, field(1, b"location") + field(2, b"w"))
    inner = field(1, field(5, field(6, field(5, tensor))))  # a graph in an attribute of a node
    return field(7, field(5, tensor) + field(15, field(2, tensor)) + inner) + field(
        25, field(7, field(5, field(10, tensor)))
    )


def safetensors() -> bytes:
    """Return a safetensors file."""
    header = json.dumps(HEADER).encode()
    return len(header).to_bytes(8, "little") + header + bytes(16)


def post(body: bytes, *headers: str) -> bytes:
    """Return an HTTP request."""
    lines = ["POST /v1/completions?a HTTP/1.1", "Host: x", *headers, f"Content-Length: {len(body)}"]
    return "\r\n".join((*lines, "", "")).encode() + body


def seeds() -> dict[str, list[bytes]]:
    """Return the seeds of every target."""
    request = json.dumps(REQUEST).encode()
    health = b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
    return {
        "manifest": [json.dumps(MANIFEST).encode()[1:]],
        "safetensors": [safetensors(), graph(), json.dumps(CONTRACT).encode(), json.dumps(IO).encode()],
        "tokenizer": [json.dumps(TOKENIZER).encode() + "\0<s>ab (?i:'s|[^\\s\\p{L}]+(?!a){1,3}) e\u0301".encode()],
        "request": [
            request,
            b'{"model":"m","prompt":[1,2,3]}',
            json.dumps(CHAT).encode(),
            post(request, "Expect: 100-continue", "Authorization: Bearer x", "Content-Type: application/json") + health,
            health + post(b'{"model":"m","prompt":[1]}', "Connection: close"),
        ],
    }


def write(directory: Path) -> list[str]:
    """Write them and return the names of the targets."""
    for target, found in seeds().items():
        (directory / target).mkdir(parents=True, exist_ok=True)
        for i, seed in enumerate(found):
            (directory / target / str(i)).write_bytes(seed)
    return list(seeds())


if __name__ == "__main__":
    print(*write(Path(sys.argv[1])))
