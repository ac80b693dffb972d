#!/usr/bin/env bash
# The GPU tests and the whole GPU bench in one call of at most 9 minutes. Usage: perf/gpu.sh [COMMIT]
# COMMIT is recorded in the rows where this folder is no git checkout. Rows and logs go to $OUT, default perf/results.
# Exit code: 0 if tests and bench succeeded, 1 if either failed or ran out of time.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-perf/results}
mkdir -p "$out"
out=$(cd "$out" && pwd)
status=0

# 540 s in all: 40 to install, 150 for tests, 340 for the bench (300 of them its budget: the last case may overrun it)
install_seconds=40
test_seconds=150
bench_seconds=340
budget_seconds=300

have() {
    python3 -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"
}

{
    date -u
    nvidia-smi || rocm-smi
    python3 -c 'import torch; print(torch.__version__, torch.cuda.is_available() and torch.cuda.get_device_name())'
} > "$out/gpu-machine.log" 2>&1

# what the tests need beyond torch and triton; without network the parts that lack something say so
missing=()
for package in numpy rich pytest hypothesis; do
    have "$package" || missing+=("$package")
done
if [ "${#missing[@]}" -gt 0 ]; then
    timeout -k 5 "$install_seconds" python3 -m pip install --quiet --retries 0 --timeout 5 "${missing[@]}" >> "$out/gpu-machine.log" 2>&1 ||
        echo "could not install: ${missing[*]}" | tee -a "$out/gpu-machine.log"
fi

if have pytest && have hypothesis; then
    timeout -k 10 "$test_seconds" python3 -m pytest tests -m gpu -q -p no:cacheprovider --continue-on-collection-errors > "$out/gpu-tests.log" 2>&1
    code=$?
    # 5: no test carries the marker
    if [ "$code" -ne 0 ] && [ "$code" -ne 5 ]; then
        status=1
    fi
else
    echo "not run: pytest or hypothesis is missing" > "$out/gpu-tests.log"
    status=1
fi
tail -n 1 "$out/gpu-tests.log"

arguments=(--device cuda --budget-seconds "$budget_seconds" --out "$out")
if [ $# -gt 0 ]; then
    arguments+=(--commit "$1")
fi
timeout -k 10 "$bench_seconds" python3 -m perf "${arguments[@]}" > "$out/gpu-bench.log" 2>&1 || status=1
tail -n 3 "$out/gpu-bench.log"
exit "$status"
