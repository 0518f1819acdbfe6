#!/bin/bash
# Real users: titles for scientific abstracts, SmolLM2-135M as policy and as backbone of the reward models (frozen, bfloat16).
# Trains lore and global_rm on 30 authors, adapts 10 new ones, measures them, and writes titles for their query abstracts.
#   runs/pref_lamp.sh [FOLDER_WITH_DATA]     about half an hour on two cores; stages that are done are not done again
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:-../shared/data/pref_lamp_like/ci}
out=${OUT_DIR:-runs/output/pref_lamp}
pyargs=${PYARGS:-.venv/bin/pyargs}
if [ ! -d "$data" ]; then echo "no data at $data: skipped"; exit 0; fi

source=(--data pref_lamp --source "$data")
lm=(--policy smollm2-135m --dtype bfloat16)
mkdir -p "$out"
for method in global_rm lore; do
  "$pyargs" train $method "${source[@]}" --freeze-backbone --dtype bfloat16 --out "$out/$method-seen" > "$out/$method-train.json"
  "$pyargs" adapt "$out/$method-seen" "${source[@]}" --out "$out/$method" > "$out/$method-adapt.json"
  "$pyargs" tune "$out/$method" "${lm[@]}" "${source[@]}" --objective harmonic --grid 0 0.1 0.3 1 3 --prompts 12 --batch-size 12 \
    --max-new-tokens 32 --out "$out/$method-tune.json" > /dev/null
  "$pyargs" decode "$out/$method" "${lm[@]}" "${source[@]}" --tuned "$out/$method-tune.json" --max-new-tokens 32 \
    --batch-size 12 --out "$out/$method-tuned.jsonl" > /dev/null
done
# The control: no reward in the same loop.
"$pyargs" decode "$out/lore" "${lm[@]}" "${source[@]}" --reward-weight 0 --max-new-tokens 32 --batch-size 12 \
  --out "$out/weight-0.jsonl" > /dev/null
"$pyargs" evaluate "$out/global_rm" "${lm[@]}" "${source[@]}" --tuned "$out/global_rm-tune.json" \
  --generations "$out/global_rm-tuned.jsonl" "$out/weight-0.jsonl" --out "$out/global_rm-result.json" > /dev/null
"$pyargs" evaluate "$out/lore" "${lm[@]}" "${source[@]}" --tuned "$out/lore-tune.json" \
  --generations "$out/lore-tuned.jsonl" "$out/weight-0.jsonl" --out "$out/lore-result.json" > /dev/null
"$(dirname "$pyargs")/python" experiments/pref_lamp_ci.py "$out" | tee "$out/pref_lamp_ci.json"
