#!/usr/bin/env bash
# Every task with a real model, greedy, 50 test problems each (MBPP 60, whose wrong answers MBPP-R
# repairs):
#   bash bench/real_model.sh MODEL_DIR DATA_DIR OUT_DIR
# DATA_DIR holds gsm8k_train, gsm8k_test, math500, mbpp, humaneval, bfcl_multiple,
# bfcl_simple_python and countdown34_train, each .jsonl as published. Goes on where it was stopped.
set -euo pipefail
model=$1 data=$2 out=$3
python=${PYTHON:-python}
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out"
run() {  # NAME, then flags
  [ -e "$out/$1.json" ] || $python "$root/evaluate.py" --model "$model" --split test \
    --limit "${LIMIT:-50}" --output "$out/$1.json" "${@:2}"
}
run function_call --task function_call --shots 2 --max_new_tokens 64 \
  --data "train=$data/bfcl_multiple.jsonl,test=$data/bfcl_simple_python.jsonl"
run countdown --task countdown --shots 3 --max_new_tokens 48 --data "$data/countdown34_train.jsonl"
run gsm8k --task gsm8k --shots 2 --max_new_tokens 192 \
  --data "train=$data/gsm8k_train.jsonl,test=$data/gsm8k_test.jsonl"
run math --task math --max_new_tokens 192 --data "test=$data/math500.jsonl"
LIMIT=60 run mbpp --task mbpp --max_new_tokens 128 --data "$data/mbpp.jsonl"
run humaneval --task humaneval --max_new_tokens 192 --data "test=$data/humaneval.jsonl"
[ -e "$out/mbpp_r.jsonl" ] ||
  $python "$root/bench/make_mbpp_r.py" "$out/mbpp.json" "$data/mbpp.jsonl" "$out/mbpp_r.jsonl"
run mbpp_r --task mbpp_r --max_new_tokens 128 --data "$out/mbpp_r.jsonl"
$python - "$out" <<'P'  # the figures of all, and the first conversations of each
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
paths = [path for path in sorted(out.glob("*.json")) if path.stem != "figures"]
all_ = {path.stem: json.loads(path.read_text()) for path in paths}
few = {name: f | {"conversations": f["conversations"][:3]} for name, f in all_.items()}
(out / "figures.json").write_text(json.dumps(few, indent=1) + "\n")
P
