#!/usr/bin/env bash
# The evaluation at smoke size: every row of the paper's tables with a tiny random model on planted users, then tables, a
# figure and the report of it. A killed run and a second one do nothing twice.
#   experiments/smoke.sh [FOLDER]        (default: a temporary folder). About two minutes on two cores.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHON="${PYTHON:-$root/.venv/bin/python}"
case $PYTHON in
  /*) ;;
  */*) PYTHON=$PWD/$PYTHON ;; # the caller's; a bare name is looked for in PATH
esac
if [ $# -ge 1 ]; then
  mkdir -p "$1"
  out=$(cd "$1" && pwd)
else
  out=$(mktemp -d)
  trap 'rm -rf "$out"' EXIT
fi
cd "$root" # whose pyargs it is that runs
export HF_HUB_OFFLINE=1

experiments() { "$PYTHON" -m experiments "$@"; }
grid() { experiments reproduce smoke --work "$out/work" --results "$out/results" > "$out/grid.json"; }

grid
grid
grep -q '"run_now": 0' "$out/grid.json" || { echo "smoke: a finished cell was run twice" >&2; exit 1; }
for number in 4 5 6 9; do experiments table "$number" --results "$out/results" --out "$out/table-$number.md"; done
experiments figure 2 --results "$out/results" --out "$out/figure-2.png"
experiments report --results "$out/results" --out "$out/report.html" > /dev/null

# The planted users disagree as often as they agree: a personal reward gets nearly all pairs right, a shared one half of them.
"$PYTHON" - "$out/results/smoke/synthetic/tiny-random" <<'PY'
import json
import sys
from pathlib import Path

for name, low, high in (("lore", 80, 100), ("lore-lora", 70, 100), ("global-rm", 30, 70)):
    accuracy = json.loads(Path(sys.argv[1], f"{name}-0.json").read_text())["values"]["rm_accuracy"]["accuracy"]
    print(f"{name}: RM accuracy {accuracy:.1f} on new users")
    if not low <= accuracy <= high:
        sys.exit(f"smoke: {accuracy:.1f} is not within {low} to {high}")
PY
echo "smoke: passed in $SECONDS s"
