#!/usr/bin/env bash
# The base table of one model, in parts:
#   bash bench/base_table.sh MODEL_DIR DATA_DIR RESULTS_DIR [TASK ...] [-- FLAGS of base_table.py]
# DATA_DIR holds mbpp, humaneval, gsm8k_test, bfcl_simple_python and bfcl_multiple, each .jsonl as
# published; Countdown's problems are generated. Goes on where RESULTS_DIR ends: with
#   ... runs/base function_call mbpp -- --name 0.5B --limit 100 --max_minutes 60
set -euo pipefail
model=$1 data=$2 out=$3
shift 3
tasks=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do tasks+=("$1") && shift; done
[ $# = 0 ] || shift
[ ${#tasks[@]} -gt 0 ] || tasks=(function_call mbpp humaneval countdown gsm8k)
calls=$(mktemp --suffix .jsonl)
trap 'rm "$calls"' EXIT
cat "$data/bfcl_simple_python.jsonl" "$data/bfcl_multiple.jsonl" >"$calls"
for task in "${tasks[@]}"; do
  case $task in
    function_call) from=(--data "test=$calls" --held_out 200) ;;  # as recipes/gpu_score_calls.sh
    mbpp) from=(--data "$data/mbpp.jsonl") ;;
    humaneval) from=(--data "test=$data/humaneval.jsonl") ;;
    gsm8k) from=(--data "test=$data/gsm8k_test.jsonl") ;;
    countdown) from=(--shots 3) ;;  # a bare expression: half the tokens, and less that is cut off
    *) echo "base_table.sh: error: no task $task here" >&2 && exit 2 ;;
  esac
  "${PYTHON:-python}" "$(dirname "$0")/base_table.py" --model "$model" --task "$task" \
    --results "$out" "${from[@]}" "$@"
done
