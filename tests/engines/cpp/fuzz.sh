#!/usr/bin/env bash
# Fuzz the readers of what a bundle holds: fuzz.sh [SECONDS of each target, 20]. Needs clang with libFuzzer; says so without.
set -euo pipefail
cd "$(dirname "$0")/../../.."
compiler=$(command -v clang++ || compgen -c clang++- | sort -V | tail -1 || true)
if [ -z "$compiler" ]; then
    echo "fuzz.sh: no clang++ here, nothing was fuzzed"
    exit 0
fi
cmake -S tests/engines/cpp -B build/fuzz -DFUZZ=ON -DCMAKE_CXX_COMPILER="$compiler" -DCMAKE_C_COMPILER="${compiler/clang++/clang}" \
    -DCMAKE_PREFIX_PATH="$PWD/build/deps" > /dev/null
cmake --build build/fuzz --parallel "$(nproc)"
.venv/bin/python - <<'PY'
import json, pathlib
root = pathlib.Path("build/fuzz/seeds")
io = {"layers": 2, "kv_heads": 2, "head_dim": 16, "vocabulary": 272, "cache_length": None, "activations": "float32", "max_positions": 96}
file = {"sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a", "bytes": 2}  # {}
manifest = {"format": 2, "coatrt": "0.1.0", "model": {"stop_tokens": [2]}, "configuration": {"file": "a"},
            "matrices": {"matrices": [["model.embed_tokens", 272, 64]]}, "engines": [], "versions": {}, "lora": "a",
            "decoders": {"cpu": {"file": "a", "weights": "a", "io": io}}, "files": {"a": file}}
header = json.dumps({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
contract = {"alpha": 32.0, "dtype": "float32", "tensors": [{"matrix": "m", "A": "a", "B": "b", "K": 2, "N": 2, "rank": 16}]}
tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
             "normalizer": {"type": "NFC"}, "added_tokens": [{"id": 3, "content": "<s>", "special": True}],
             "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}}
for target, seeds in {
    "manifest": [json.dumps(manifest).encode()[1:]],
    "safetensors": [len(header).to_bytes(8, "little") + header + bytes(16), json.dumps(contract).encode(), json.dumps(io).encode()],
    "tokenizer": [json.dumps(tokenizer).encode() + "\0<s>ab (?i:'s|[^\\s\\p{L}]+(?!a){1,3}) e\u0301".encode()],
}.items():
    (root / target).mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(seeds):
        (root / target / str(i)).write_bytes(seed)
PY
for target in manifest safetensors tokenizer; do
    mkdir -p "build/fuzz/corpus/$target"
    "build/fuzz/fuzz_$target" -max_total_time="${1:-20}" -timeout=10 -rss_limit_mb=2048 -max_len=4096 -verbosity=0 -print_final_stats=1 -artifact_prefix=build/fuzz/ \
        "build/fuzz/corpus/$target" "build/fuzz/seeds/$target" 2>&1 | grep -vE "^INFO|slowest|peak|dictionary|Uses:" | sed "s/^/$target: /"
done
