#!/usr/bin/env bash
# Every stage once, with a tiny random language model on planted users: train, adapt, tune, decode, evaluate.
#   runs/smoke.sh [FOLDER]        (default: a temporary folder). Under two minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
PYARGS="${PYARGS:-.venv/bin/pyargs}"
PYTHON="$(dirname "$PYARGS")/python"
if [ $# -ge 1 ]; then
  out=$1
  mkdir -p "$out"
else
  out=$(mktemp -d)
  trap 'rm -rf "$out"' EXIT
fi
export PYARGS_CACHE="$out/cache" HF_HUB_OFFLINE=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the model is tiny: threads would only wait for each other
log="$out/log.txt"
data=(--data synthetic)

run() { # the command's JSON goes to $out/last.json, its progress to the log
  echo "pyargs $*"
  if ! "$PYARGS" "$@" > "$out/last.json" 2>> "$log"; then
    tail -20 "$log" >&2
    echo "smoke: 'pyargs $*' failed" >&2
    exit 1
  fi
}

"$PYTHON" -c 'import sys; from pyargs.data.synthetic import tiny_lm; tiny_lm(sys.argv[1])' "$out/lm" 2>> "$log"

for method in lore global_rm; do
  for mode in frozen full; do
    flag=--no-freeze-backbone
    [ $mode = frozen ] && flag=--freeze-backbone
    run train $method "${data[@]}" --backbone "$out/lm" $flag --epochs 4 --out "$out/$method-$mode"
  done
done

run train lore "${data[@]}" --backbone "$out/lm" --freeze-backbone --epochs 4 --out "$out/lore-frozen"
grep -q '"already_done": true' "$out/last.json" || { echo "smoke: a finished stage was done twice" >&2; exit 1; }

for model in lore-full global_rm-frozen; do
  run adapt "$out/$model" "${data[@]}" --adapt-steps 100 --out "$out/$model-adapted"
  run tune "$out/$model-adapted" --policy "$out/lm" "${data[@]}" --prompts 8 --max-new-tokens 8 --out "$out/$model-tune.json"
  run decode "$out/$model-adapted" --policy "$out/lm" "${data[@]}" --tuned "$out/$model-tune.json" \
    --limit 12 --max-new-tokens 8 --out "$out/$model-generations.jsonl"
  run evaluate "$out/$model-adapted" --policy "$out/lm" "${data[@]}" --tuned "$out/$model-tune.json" \
    --generations "$out/$model-generations.jsonl" --out "$out/$model-result.json"
done

# The planted users disagree as often as they agree: a personal reward gets nearly all pairs right, a shared one half of them.
"$PYTHON" - "$out" <<'PY'
import json
import sys
from pathlib import Path

for name, low, high in (("lore-full", 80, 100), ("global_rm-frozen", 30, 70)):
    values = json.loads(Path(sys.argv[1], f"{name}-result.json").read_text())["values"]
    accuracy = values["rm_accuracy"]["accuracy"]
    print(f"{name}: RM accuracy {accuracy:.1f} on new users")
    if not low <= accuracy <= high:
        sys.exit(f"smoke: {accuracy:.1f} is not within {low} to {high}")
PY
echo "smoke: passed in $SECONDS s"
