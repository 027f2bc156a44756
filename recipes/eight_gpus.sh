#!/usr/bin/env bash
# Rehearsed on CPU (gloo, two processes, the embedded model, a few steps); has not run on a GPU yet.
# SCoRe with a model of yours on Countdown, one node:
#   MODEL=DIR_OR_HUB_NAME NPROC=4 recipes/eight_gpus.sh --stage1_steps 500
# Called again, it goes on where it was stopped, with another NPROC too.
# By the arithmetic of docs/gpus.md a model of 7B needs about 35 GiB on each of eight GPUs.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then PYTHON=$root/.venv/bin/python; [ -x "$PYTHON" ] || PYTHON=python3; fi
MODEL=${MODEL:-Qwen/Qwen2.5-7B-Instruct}
TASK=${TASK:-countdown}
OUT=${OUT:-$root/runs/eight_gpus}
NPROC=${NPROC:-8}

exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" "$root/score.py" \
  --model "$MODEL" --task "$TASK" --output_dir "$OUT" --resume "$@"
