#!/usr/bin/env bash
# Fuzz the readers of what a bundle holds and of what the service is sent: fuzz.sh [SECONDS of each target, 20].
# With clang by libFuzzer; without, as many thousand mutations by a driver of our own that knows no coverage.
set -euo pipefail
cd "$(dirname "$0")/../../.."
compiler=$(command -v clang++ || compgen -c clang++- | sort -V | tail -1 || true)
targets=$(.venv/bin/python tests/engines/cpp/fuzz_seeds.py build/fuzz/seeds)
if [ -z "$compiler" ]; then
    echo "fuzz.sh: no clang++ here: mutations of the seeds, without coverage"
    cmake -S tests/engines/cpp -B build/cpp -DCMAKE_PREFIX_PATH="$PWD/build/deps" > /dev/null
    for target in $targets; do
        cmake --build build/cpp --parallel "$(nproc)" --target "fuzz_$target" > /dev/null
        "build/cpp/fuzz_$target" "build/fuzz/seeds/$target" "${1:-20}000" | sed "s/^/$target: /"
    done
    exit 0
fi
cmake -S tests/engines/cpp -B build/fuzz -DFUZZ=ON -DCMAKE_CXX_COMPILER="$compiler" -DCMAKE_C_COMPILER="${compiler/clang++/clang}" \
    -DCMAKE_PREFIX_PATH="$PWD/build/deps" > /dev/null
cmake --build build/fuzz --parallel "$(nproc)"
for target in $targets; do
    mkdir -p "build/fuzz/corpus/$target"
    "build/fuzz/fuzz_$target" -max_total_time="${1:-20}" -timeout=10 -rss_limit_mb=2048 -max_len=4096 -verbosity=0 -print_final_stats=1 -artifact_prefix=build/fuzz/ \
        "build/fuzz/corpus/$target" "build/fuzz/seeds/$target" 2>&1 | grep -vE "^INFO|slowest|peak|dictionary|Uses:" | sed "s/^/$target: /"
done
