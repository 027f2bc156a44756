#!/usr/bin/env bash
# Rehearsed on CPU (models/tiny on its own task, 0.5B for two steps); has not run on a GPU.
# SCoRe on MBPP, the paper's own experiment with code, in a quarter of an hour, or what fits one:
#   recipes/gpu_score_mbpp.sh MODEL_DIR mbpp.jsonl humaneval.jsonl --seed 1
#   METHOD=plain OUT=runs/plain STATE=brought_along MINUTES=13 recipes/gpu_score_mbpp.sh ...
# Trained on MBPP's train split (374 problems), evaluated on its test split and on HumanEval, as the
# paper does. Called again, it goes on.
set -euo pipefail
. "$(dirname "$0")/time_box.sh"
[ $# -ge 3 ] || stop "give MODEL_DIR, MBPP and HUMANEVAL, then flags of score.py"
model=$1 mbpp=$2 humaneval=$3
shift 3
METHOD=${METHOD:-score}
TASK=${TASK:-mbpp}  # another is for rehearsals, with - for both files
OUT=${OUT:-$root/runs/gpu_mbpp_$METHOD}
check_model "$model"
check_data MBPP "$mbpp"
check_data HUMANEVAL "$humaneval"
case $METHOD in  # as in gpu_score_calls.sh
  score) method=(--stage1_steps 40 --stage2_steps 160) ;;
  plain) method=(--stage1_steps 0 --stage2_steps 200 --alpha 0) ;;
  *) stop "METHOD=$METHOD: score or plain" ;;
esac
begin 35 20
from=()
if [ "$mbpp" != - ]; then from=(--data "$mbpp"); fi

# As gpu_score_calls.sh; but the paper's beta2 with code is 0.25, its learning rate twice as high
# (for adapters 1e-4), and first attempts see three examples, all of which is the task's default.
# The paper's batch has 128 rows. MBPP's own programs take up to 200 tokens but for a few.
# A small model's update most likely waits for its launches on an H100 (docs/gpus.md), so
# micro-batches are four times the default's.
train score.py --model "$model" --task "$TASK" "${from[@]}" "${method[@]}" \
  --lora_rank 4 --problems 16 --group_size 4 --second_attempts 4 --max_new_tokens 256 \
  --token_budget 65536 --save_every 10 --keep 1 --eval_every 40 \
  --eval_problems 32 --final_problems 32 "$@"

trained=(--model "$OUT/run/checkpoint" --base "$model")
sampled=(--temperature 1 --samples "${SAMPLES:-2}")
other=(--task humaneval --data "test=$humaneval" --shots 0 --max_new_tokens 512)
evaluate "trained_${step}_sampled" "${trained[@]}" "${sampled[@]}"
evaluate base_sampled --model "$model" "${sampled[@]}"
evaluate "trained_${step}_greedy" "${trained[@]}"
evaluate base_greedy --model "$model"
[ "$humaneval" != - ] || exit 0
evaluate "trained_${step}_humaneval_greedy" "${trained[@]}" "${other[@]}"
evaluate base_humaneval_greedy --model "$model" "${other[@]}"
evaluate "trained_${step}_humaneval_sampled" "${trained[@]}" "${sampled[@]}" "${other[@]}"
evaluate base_humaneval_sampled --model "$model" "${sampled[@]}" "${other[@]}"
