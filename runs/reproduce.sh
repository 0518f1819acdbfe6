#!/usr/bin/env bash
# The paper's evaluation, profile by profile: every method, seed, policy and data set, each a cell below experiments/results, which
# `pyargs table`, `pyargs figure` and `pyargs report` read.
#   runs/reproduce.sh smoke|cpu|gpu|paper [--only ROW ...] [--sets SET ...] [--dry-run]      (experiments/reproduce.py has the rest)
# Killed at any point, it goes on where it was. What is done is not done again. Paths are the caller's, wherever this file lies.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
exec "${PYTHON:-$root/.venv/bin/python}" "$root/experiments/reproduce.py" "$@"
