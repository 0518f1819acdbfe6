#!/usr/bin/env bash
# Every method trained, adapted and evaluated once, and every kind of model decoded, with a tiny
# random language model on planted users.
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
data=(--data synthetic)

run() { # the command's JSON goes to NAME-last.json, its progress to the log
  echo "pyargs $*"
  if ! "$PYARGS" "$@" > "$out/$name-last.json" 2>> "$out/$name.log"; then
    tail -20 "$out/$name.log" >&2
    echo "smoke: 'pyargs $*' failed" >&2
    exit 1
  fi
}

train() { # METHOD FLAGS: the profile's single pass teaches nothing, so what is checked for accuracy trains longer
  run train "$1" --profile smoke "${@:2}" --out "$out/$name"
  run adapt "$out/$name" "${data[@]}" --out "$out/$name-adapted"
}

chain() { # NAME METHOD FLAGS
  name=$1
  local method=$2 model="$out/$1-adapted" policy=(--policy tiny-random) few=(--limit 12 --max-new-tokens 8)
  train "$method" "${@:3}"
  case $name in
    pdpo | icl) # they answer by themselves
      run decode "$model" "${data[@]}" "${few[@]}" --out "$out/$name.jsonl"
      run evaluate "$model" "${data[@]}" --generations "$out/$name.jsonl" --out "$out/$name-result.json"
      ;;
    lore | global_rm | genarm) # the whole way
      run tune "$model" "${policy[@]}" "${data[@]}" --prompts 8 --max-new-tokens 8 --out "$out/$name-tune.json"
      run decode "$model" "${policy[@]}" "${data[@]}" --tuned "$out/$name-tune.json" "${few[@]}" --out "$out/$name.jsonl"
      run evaluate "$model" "${policy[@]}" "${data[@]}" --tuned "$out/$name-tune.json" --generations "$out/$name.jsonl" \
        --out "$out/$name-result.json"
      if [ "$name" = genarm ]; then
        run decode "$model" "${policy[@]}" "${data[@]}" --reward-weight 1 --whole-vocabulary --do-sample "${few[@]}" \
          --out "$out/$name-own.jsonl"
      fi
      ;;
    pal-b) # ranks whole responses only
      run decode "$model" "${policy[@]}" "${data[@]}" --best-of 2 "${few[@]}" --out "$out/$name.jsonl"
      run evaluate "$model" "${data[@]}" --out "$out/$name-result.json"
      ;;
    *) # another head, decoded the same way: RM accuracy
      run evaluate "$model" "${data[@]}" --out "$out/$name-result.json"
      ;;
  esac
}

one() { # every second chain, so that two cores have one each
  local number=0
  while read -r words; do
    [ $((number++ % 2)) -eq "$1" ] || continue
    # shellcheck disable=SC2086
    chain $words
  done <<'CHAINS'
lore lore --epochs 4 --adapt-steps 100
global_rm global_rm --freeze-backbone
genarm genarm
lore-frozen lore --freeze-backbone --epochs 4
pdpo pdpo --adapt-steps 2
pref pref --rank 2
icl icl --shots 2
vpl vpl --latent 16
pal-a pal --variant A
mpu mpu --freeze-backbone
pal-b pal --variant B
CHAINS
}

"$PYTHON" -c 'from pyargs.lm.hub import resolve; resolve("tiny-random")'
one 0 & first=$!
one 1 & second=$!
wait $first
wait $second

name=lore
run train lore --profile smoke --epochs 4 --adapt-steps 100 --out "$out/lore"
grep -q '"already_done": true' "$out/lore-last.json" || { echo "smoke: a finished stage was done twice" >&2; exit 1; }

# The planted users disagree as often as they agree: a personal reward gets nearly all pairs right, a shared one half of them.
"$PYTHON" - "$out" <<'PY'
import json
import sys
from pathlib import Path

for name, low, high in (("lore", 80, 100), ("global_rm", 30, 70)):
    values = json.loads(Path(sys.argv[1], f"{name}-result.json").read_text())["values"]
    accuracy = values["rm_accuracy"]["accuracy"]
    print(f"{name}: RM accuracy {accuracy:.1f} on new users")
    if not low <= accuracy <= high:
        sys.exit(f"smoke: {accuracy:.1f} is not within {low} to {high}")
PY
echo "smoke: passed in $SECONDS s"
