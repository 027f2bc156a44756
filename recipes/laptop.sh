#!/usr/bin/env bash
# Has run, to its end, on a two-core laptop-class CPU.
# SCoRe on the embedded model, then what it says at the same problems before and after:
#   recipes/laptop.sh                 flags of score.py may follow; goes on where it was stopped
#   OUT=somewhere recipes/laptop.sh   the run's directory
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then PYTHON=$root/.venv/bin/python; [ -x "$PYTHON" ] || PYTHON=python3; fi
MODEL=${MODEL:-$root/models/tiny}
OUT=${OUT:-$root/runs/laptop}

"$PYTHON" "$root/score.py" --model "$MODEL" --output_dir "$OUT" --resume "$@"
for model in "$MODEL" "$OUT/checkpoint"; do
  "$PYTHON" "$root/evaluate.py" --model "$model" --limit 100
done
