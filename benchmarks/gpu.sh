#!/usr/bin/env bash
# Everything that a machine with a GPU has to show, in one go: builds, tests, sanitizes, measures, and writes
# benchmarks/results/<gpu>.json with the commit and versions.
#
#   benchmarks/gpu.sh [--dry-run] [--out FOLDER] [STAGE ...]      stages: build test sanitize kernels decode (default: all)
#
# PYTHON names the interpreter with torch (default python3); the machine needs nvcc, no network. Stages write their numbers as
# they go to FOLDER (default build/gpu), so a run that is cut off loses one table at most, and `collect` puts together what
# there is. --dry-run: every command on small shapes, on a CPU where there is no GPU; writes nothing under benchmarks/results.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
out=build/gpu dry=() stages=()
while (($#)); do
  case $1 in
    --dry-run) dry=(--dry-run) ;;
    --out) out=${2:?--out needs a folder} && shift ;;
    build | test | sanitize | kernels | decode) stages+=("$1") ;;
    *) sed -n '2,11p' "$0" | cut -c3- && exit 2 ;;
  esac
  shift
done
((${#stages[@]})) || stages=(build test sanitize kernels decode)
mkdir -p "$out"

build_stage() {
  "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --editable . && "$PYTHON" -m pyargs.cli env
}

# The ops with their arguments on the GPU, and the captured step there; without a GPU the first skip.
test_stage() {
  "$PYTHON" -m pytest -q tests/ops/test_gpu.py tests/test_captured.py 2>&1 | tee "$out/test.txt"
}

# A few small cases each, since every access is checked: out of bounds, races in shared memory, barriers, uninitialised reads.
# Only our kernels, but for initcheck, which has to see who wrote what ours read.
sanitize_stage() {
  if ! command -v compute-sanitizer >/dev/null; then
    echo "no compute-sanitizer here: skipped" | tee "$out/sanitize.txt"
    return
  fi
  : >"$out/sanitize.txt"
  local tool failed=0
  for tool in memcheck racecheck synccheck initcheck; do
    local ours=(--kernel-regex kns=pyargs)
    [[ $tool == initcheck ]] && ours=()
    echo "== $tool" | tee -a "$out/sanitize.txt"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" "${ours[@]}" --error-exitcode 1 \
      "$PYTHON" benchmarks/gpu_small.py 2>&1 | tee -a "$out/sanitize.txt" || failed=1
  done
  return $failed
}

kernels_stage() {
  "$PYTHON" benchmarks/gpu_kernels.py --json "$out/kernels.json" "${dry[@]}" 2>&1 | tee "$out/kernels.txt"
}

decode_stage() {
  "$PYTHON" benchmarks/gpu_decode.py --json "$out/decode.json" "${dry[@]}" 2>&1 | tee "$out/decode.txt"
}

# A stage that fails does not keep the others from running.
failed=()
for stage in "${stages[@]}"; do
  echo "=== $stage"
  "${stage}_stage" || failed+=("$stage")
  [[ $stage == build && ${#failed[@]} -gt 0 ]] && exit 1
done
"$PYTHON" benchmarks/gpu_collect.py "$out" "${dry[@]}" || failed+=(collect)
((${#failed[@]} == 0)) || { echo "FAILED: ${failed[*]}" && exit 1; }
