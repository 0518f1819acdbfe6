#!/usr/bin/env bash
# Everything that a machine with a GPU has to show, in parts of at most 8 minutes:
#
#   benchmarks/gpu.sh [--dry-run] [--out FOLDER] [PART ...]      default: A B C D, into build/gpu
#
#   A  environment, each op's tests in a process of its own, the captured step
#   B  kernels beside PyTorch's, then memcheck and racecheck; synccheck and initcheck if time is left. initcheck also sees torch's
#      own kernels, so what it says is told and fails nothing
#   C  decoding with 0.5B, 1.5B and 3B
#   D  decoding with 7B; torch.compile if time is left
#
# PYTHON names the interpreter with torch (default python3); the machine needs nvcc, no network. Each part first builds what is not
# built yet. FOLDER gets gpu.json (of every stage exit code, seconds and last lines; the numbers, as they come) and a log of each
# part. What it holds of other parts and sizes stays. Exits with 1 if a stage failed, or was cut off.
# --dry-run: every command on small shapes, on a CPU where there is no GPU; nothing is built.
set -uo pipefail
PYTHON=${PYTHON:-python3}
out= dry=() parts=()
while (($#)); do
  case $1 in
    --dry-run) dry=(--dry-run) ;;
    --out) out=$(realpath -m "${2:?--out needs a folder}") && shift ;;
    A | B | C | D) parts+=("$1") ;;
    *) sed -n '2,18p' "$0" | cut -c3- && exit 2 ;;
  esac
  shift
done
cd "$(dirname "$0")/.."
out=${out:-$PWD/build/gpu}
((${#parts[@]})) || parts=(A B C D)
mkdir -p "$out"
export PYTHONPATH=$PWD
LIMIT=450 # seconds of a part; what ends a stage takes some, too
failed=() told=()

# stage NAME COMMAND ...: runs it for as long as the part has time, into the log and into gpu.json.
stage() {
  local name=$1 left=$((deadline - SECONDS)) start=$SECONDS code=124
  shift
  echo "=== $part $name: $*" | tee "$out/stage.log"
  if ((left > 0)); then
    timeout --kill-after=10 "$left" "$@" 2>&1 | tee -a "$out/stage.log"
    code=${PIPESTATUS[0]}
  fi
  cat "$out/stage.log" >>"$out/$part.log"
  "$PYTHON" benchmarks/gpu_results.py "$out" "$name" "$code" $((SECONDS - start)) <"$out/stage.log" || code=1
  rm "$out/stage.log"
  ((code == 0)) || failed+=("$part $name ($code)")
  return "$code"
}

# if_time SECONDS NAME COMMAND ...: a stage that is left out where less time is left.
if_time() {
  local needed=$1
  shift
  if ((deadline - SECONDS >= needed)); then stage "$@"; else stage "$1" echo "left out: less than $needed s are left"; fi
}

# advisory FUNCTION NAME COMMAND ...: a stage, by one of these functions, whose failure is told and fails nothing.
advisory() {
  local before=("${failed[@]}")
  "$@" || told+=("${failed[-1]}")
  failed=("${before[@]}")
}

python_tests() { # NAME FILE WORDS
  if ((${#dry[@]})); then set -- "$@" --collect-only; fi
  stage "$1" "$PYTHON" -m pytest -q "$2" "${@:3}"
}

# A few small cases, since every access is checked. Only our kernels, but for initcheck, which has to see who wrote what ours read.
sanitizer() { # TOOL
  local ours=(--kernel-name kns=pyargs) # since CUDA 12.3; --kernel-regex before
  [[ $1 == initcheck ]] && ours=()
  echo env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" "${ours[@]}" --error-exitcode 1
}

part_A() {
  stage env "$PYTHON" -m pyargs.cli env
  local op
  for op in topk_logprobs score_select score_step tokenwise_select tokenwise_step user_mlp commit branch_attention; do
    python_tests "$op" tests/ops/test_gpu.py -k "like_the_reference and $op"
  done
  python_tests repeatable tests/ops/test_gpu.py -k "not like_the_reference"
  python_tests captured tests/decode/backends/test_cuda_graph.py
}

part_B() {
  stage kernels "$PYTHON" benchmarks/gpu_kernels.py --out "$out" "${dry[@]}"
  if ! command -v compute-sanitizer >/dev/null; then
    stage sanitizers echo "left out: no compute-sanitizer here"
    ((${#dry[@]} == 0)) || stage small "$PYTHON" benchmarks/gpu_small.py
    return
  fi
  local tool
  for tool in memcheck racecheck; do stage "$tool" $(sanitizer "$tool") "$PYTHON" benchmarks/gpu_small.py; done
  if_time 60 synccheck $(sanitizer synccheck) "$PYTHON" benchmarks/gpu_small.py
  advisory if_time 60 initcheck $(sanitizer initcheck) "$PYTHON" benchmarks/gpu_small.py
}

part_C() {
  local size sizes=(0.5B 1.5B 3B)
  ((${#dry[@]} == 0)) || sizes=(0.5B) # all are the same tiny model
  for size in "${sizes[@]}"; do stage "decode $size" "$PYTHON" benchmarks/gpu_decode.py --out "$out" --sizes "$size" "${dry[@]}"; done
}

part_D() {
  stage "decode 7B" "$PYTHON" benchmarks/gpu_decode.py --out "$out" --sizes 7B "${dry[@]}"
  if_time 200 "decode 0.5B compiled" "$PYTHON" benchmarks/gpu_decode.py --out "$out" --sizes 0.5B --compiled "${dry[@]}"
}

for part in "${parts[@]}"; do
  deadline=$((SECONDS + LIMIT))
  : >"$out/$part.log"
  if ((${#dry[@]} == 0)); then
    stage build env PYARGS_CUDA=ON "$PYTHON" setup.py -q build_ext --inplace || continue # nothing of the part can run
  fi
  "part_$part"
done
((${#told[@]} == 0)) || printf 'FAILED, but advisory: %s\n' "${told[@]}"
((${#failed[@]} == 0)) || { printf 'FAILED: %s\n' "${failed[@]}" && exit 1; }
