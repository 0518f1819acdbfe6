#!/usr/bin/env bash
# Everything that a machine with a GPU has to show, in one go: builds, tests, sanitizes, measures, and writes
# benchmarks/results/<gpu>.json with the commit and versions.
#
#   benchmarks/gpu.sh [--dry-run] [--out FOLDER] [STAGE ...]      stages: build test sanitize kernels decode (default: all)
#
# PYTHON names the interpreter with torch (default python3); the machine needs nvcc, no network. Stages write their numbers as
# they go to FOLDER (default build/gpu), so a run that is cut off loses one table at most, and `collect` puts together what
# there is. --dry-run: every command on small shapes, on a CPU where there is no GPU; writes nothing under benchmarks/results.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
out=build/gpu dry=() stages=()
while (($#)); do
  case $1 in
    --dry-run) dry=(--dry-run) ;;
    --out) out=$2 && shift ;;
    build | test | sanitize | kernels | decode) stages+=("$1") ;;
    *) sed -n '2,10p' "$0" | cut -c3- && exit 2 ;;
  esac
  shift
done
((${#stages[@]})) || stages=(build test sanitize kernels decode)
mkdir -p "$out"

build() {
  "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --editable .
  "$PYTHON" -m pyargs.cli env
}

# The ops with their arguments on the GPU, and the decoders there; without a GPU they skip.
test() {
  "$PYTHON" -m pytest -q tests/ops/test_gpu.py tests/test_captured.py | tee "$out/test.txt"
}

# A few small cases each, since every access is checked: out of bounds, races in shared memory, barriers, uninitialised reads.
sanitize() {
  if ! command -v compute-sanitizer >/dev/null; then
    echo "no compute-sanitizer here: skipped" | tee "$out/sanitize.txt"
    return
  fi
  : >"$out/sanitize.txt"
  local tool
  for tool in memcheck racecheck synccheck initcheck; do
    echo "== $tool" | tee -a "$out/sanitize.txt"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --kernel-regex kns=pyargs --error-exitcode 1 \
      "$PYTHON" benchmarks/gpu_small.py 2>&1 | tee -a "$out/sanitize.txt"
  done
}

kernels() {
  "$PYTHON" benchmarks/gpu_kernels.py --json "$out/kernels.json" "${dry[@]}" | tee "$out/kernels.txt"
}

decode() {
  "$PYTHON" benchmarks/gpu_decode.py --json "$out/decode.json" "${dry[@]}" | tee "$out/decode.txt"
}

for stage in "${stages[@]}"; do
  echo "=== $stage"
  "$stage"
done
"$PYTHON" benchmarks/gpu_collect.py "$out" "${dry[@]}"
