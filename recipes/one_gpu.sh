#!/usr/bin/env bash
# Rehearsed on CPU (--dtype bfloat16, the embedded model, a few steps); has not run on a GPU yet.
# SCoRe with a model of yours on Countdown:
#   MODEL=DIR_OR_HUB_NAME TASK=gsm8k recipes/one_gpu.sh --data ... --stage1_steps 500
# Called again, it goes on where it was stopped; with --max_minutes 55 it stops by itself in time.
# Learning rate and KL weights are the paper's (its steps and rows: --preset paper), token limits
# the task's; nothing here was tuned.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then PYTHON=$root/.venv/bin/python; [ -x "$PYTHON" ] || PYTHON=python3; fi
MODEL=${MODEL:-Qwen/Qwen2.5-1.5B-Instruct}
TASK=${TASK:-countdown}
OUT=${OUT:-$root/runs/one_gpu}

exec "$PYTHON" "$root/score.py" --model "$MODEL" --task "$TASK" --output_dir "$OUT" --resume "$@"
