#!/usr/bin/env bash
# SCoRe with a real model on function calls, about 20 minutes on two cores:
#   bash bench/train_real_model.sh MODEL_DIR bfcl_simple_python.jsonl OUT_DIR
# It trains on four fifths of the first 80 problems of that evaluation set, by their hash; so nobody
# may compare the result with the leaderboard. With this prompt, four examples and T = 0.5
# SmolLM2-135M answers a fifth of them right, of the rest less, and with the task's own prompt or at
# T = 1 next to none. Goes on where it was stopped.
set -euo pipefail
model=$1 data=$2 out=$3
python=${PYTHON:-python}
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out"
head -n 80 "$data" > "$out/calls.jsonl"
$python "$root/score.py" --model "$model" --task function_call --data "$out/calls.jsonl" \
  --shots 4 --prompts "$root/bench/prompts_calls.json" \
  --max_new_tokens 64 --temperature 0.5 --lr 1e-5 --warmup 4 --eval_every 9 \
  --eval_problems 8 --final_problems 8 --save_every 3 --probe 32 \
  --problems 4 --group_size 2 --second_attempts 2 --stage1_steps 6 --stage2_steps 12 \
  --output_dir "$out/score" --resume
