#!/usr/bin/env bash
# Rehearsed on CPU (models/tiny on its own task, 0.5B for two steps); has not run on a GPU.
# Reflect, Retry, Reward in a quarter of an hour, or what fits one; called again, it goes on:
#   recipes/gpu_rrr.sh MODEL_DIR function_call calls.jsonl --seed 1
#   STATE=brought_along MINUTES=13 recipes/gpu_rrr.sh MODEL_DIR countdown -
# DATA -: the task's own problems. Of function calls 200 problems are held out, as in
# gpu_score_calls.sh; so again no comparison with BFCL's leaderboard. The gain may be the
# reflection's or the retry's, or any retry's: hence the controls, after the same failures.
set -euo pipefail
. "$(dirname "$0")/time_box.sh"
[ $# -ge 3 ] || stop "give MODEL_DIR, TASK and DATA, then flags of rrr.py"
model=$1 task=$2 data=$3
shift 3
OUT=${OUT:-$root/runs/gpu_rrr_$task}
check_model "$model"
check_data DATA "$data"
case $task in
  function_call | countdown | tiny) ;;
  *) stop "TASK $task: function_call or countdown (tiny: for rehearsals)" ;;
esac
begin 40 30
from=()
if [ "$data" != - ]; then
  hold_out "$task" "$data" 200
  from=(--data "train=$OUT/data/train.jsonl,test=$OUT/data/test.jsonl")
fi

# The KL weight 0.001 and the cosine are the paper's. A step of its 256 failures would be 2,048
# rows: here are 256, of 32 failures x 8 reflections. Its learning rate is for 1,750 steps: with a
# hundred ten times 5e-7, what adapters get, would move little. 5e-5 is SCoRe's for adapters, and
# not tuned. Failures are collected before the first step, once for all calls.
# A small model's update most likely waits for its launches on an H100 (docs/gpus.md), so
# micro-batches are four times the default's.
train rrr.py --model "$model" --task "$task" "${from[@]}" \
  --lora_rank 4 --failures_per_step 32 --group_size 8 --steps 100 --lr 5e-5 --queries 512 \
  --max_new_tokens 128 --max_reflection_tokens 128 --controls False \
  --token_budget 65536 --save_every 10 --keep 1 --eval_every 40 \
  --eval_problems 32 --final_problems 32 "$@"

trained=(--model "$OUT/run/checkpoint" --base "$model" --method)
base=(--model "$model" --method)
sampled=(--temperature 1 --samples "${SAMPLES:-2}")
evaluate "trained_${step}_sampled" "${trained[@]}" reflect_retry "${sampled[@]}"
evaluate base_sampled "${base[@]}" reflect_retry "${sampled[@]}"
evaluate base_blind_sampled "${base[@]}" blind_retry "${sampled[@]}"
evaluate "trained_${step}_reflects_base_retries_sampled" "${base[@]}" reflect_retry \
  --reflector "$OUT/run/checkpoint" --base "$model" "${sampled[@]}"
evaluate "trained_${step}_blind_sampled" "${trained[@]}" blind_retry "${sampled[@]}"
evaluate "trained_${step}_greedy" "${trained[@]}" reflect_retry
evaluate base_greedy "${base[@]}" reflect_retry
evaluate base_fresh_sampled "${base[@]}" fresh_attempt "${sampled[@]}"
evaluate base_generic_sampled "${base[@]}" generic_reflection "${sampled[@]}"
