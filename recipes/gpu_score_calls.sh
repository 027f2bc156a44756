#!/usr/bin/env bash
# Has run, to its end, on an H200, with Qwen2.5-Coder-0.5B (docs/results.md, "On real models").
# SCoRe on function calls in a quarter of an hour, or what fits one; called again, it goes on:
#   recipes/gpu_score_calls.sh MODEL_DIR DATA --seed 1
#   METHOD=plain OUT=runs/plain STATE=brought_along MINUTES=13 recipes/gpu_score_calls.sh ...
# DATA: rows of APIGen or BFCL in one file, as in
#   cat bfcl_simple_python.jsonl bfcl_multiple.jsonl > calls.jsonl
# BFCL is an evaluation set: 200 problems, those with the lowest hashes, are held out (time_box.sh),
# the others trained on; so nobody may compare the result with the leaderboard.
set -euo pipefail
. "$(dirname "$0")/time_box.sh"
[ $# -ge 2 ] || stop "give MODEL_DIR and DATA, then flags of score.py"
model=$1 data=$2
shift 2
METHOD=${METHOD:-score}
TASK=${TASK:-function_call}  # another is for rehearsals, with DATA - for its own problems
OUT=${OUT:-$root/runs/gpu_calls_$METHOD}
check_model "$model"
check_data DATA "$data"
# Both have 200 steps. The paper does not say how long Stage I is; a fifth is --preset paper's.
# Plain multi-turn RL has neither Stage I nor the bonus, and is the same in all else.
case $METHOD in
  score) method=(--stage1_steps 40 --stage2_steps 160) ;;
  plain) method=(--stage1_steps 0 --stage2_steps 200 --alpha 0) ;;
  *) stop "METHOD=$METHOD: score or plain" ;;
esac
begin 25 15
from=()
if [ "$data" != - ]; then
  hold_out "$TASK" "$data" 200
  from=(--data "train=$OUT/data/train.jsonl,test=$OUT/data/test.jsonl")
fi

# alpha 10, beta1 0.01, beta2 0.1, T = 1 are the paper's, and what another model than models/tiny
# gets by itself; so is ten times its learning rate for adapters, 5e-5, in steps of 128 rows and up.
# 256 rows are 16 problems x 4 first x 4 second attempts. Calls of BFCL take 20 to 100 tokens. The
# best checkpoint is looked for over 10 steps, which may be all that a call adds.
# A small model's update most likely waits for its launches on an H100 (docs/gpus.md), so
# micro-batches are four times the default's.
train score.py --model "$model" --task "$TASK" "${from[@]}" "${method[@]}" \
  --lora_rank 4 --problems 16 --group_size 4 --second_attempts 4 --max_new_tokens 128 \
  --token_budget 65536 --save_every 10 --keep 1 --eval_every 40 \
  --eval_problems 32 --final_problems 32 "$@"

trained=(--model "$OUT/run/checkpoint" --base "$model")
sampled=(--temperature 1 --samples "${SAMPLES:-4}")
evaluate "trained_${step}_sampled" "${trained[@]}" "${sampled[@]}"
evaluate base_sampled --model "$model" "${sampled[@]}"
evaluate "trained_${step}_greedy" "${trained[@]}"
evaluate base_greedy --model "$model"
