#!/usr/bin/env bash
# RRR with a real model on the easiest task that gives SmolLM2-135M any signal, about 20 minutes on
# two cores:
#   bash bench/train_real_rrr.sh MODEL_DIR OUT_DIR
# Countdown with two numbers up to 12 and 24 examples. Right are a quarter of its first answers, and
# about one in a hundred of its retries, so few that the probe may well see none: hence --probe 0.
# Goes on where it was stopped.
set -euo pipefail
model=$1 out=$2
python=${PYTHON:-python}
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out"
$python - > "$out/numbers.jsonl" <<'END'
import itertools, json, random
rows = {}
for a, b in itertools.combinations(range(2, 13), 2):
    for target, solution in ((a + b, f"{b} + {a}"), (b - a, f"{b} - {a}"), (a * b, f"{b} * {a}")):
        rows[a, b, target] = {"nums": [a, b], "target": target, "solution": solution}
rows = list(rows.values())
random.Random(0).shuffle(rows)
print("\n".join(map(json.dumps, rows)))
END
$python "$root/rrr.py" --model "$model" --task countdown --data "$out/numbers.jsonl" --shots 24 \
  --prompts "$root/bench/prompts_numbers.json" \
  --max_new_tokens 16 --max_reflection_tokens 16 --temperature 0.7 --lr 3e-6 --warmup 3 \
  --eval_every 6 --eval_problems 8 --final_problems 8 --save_every 4 --probe 0 --queries 128 \
  --tries 4 --failures_per_step 8 --steps 12 \
  --output_dir "$out/rrr" --resume
