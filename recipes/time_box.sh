# Not run by itself: what gpu_score_calls.sh, gpu_score_mbpp.sh and gpu_rrr.sh have in common.
# Has run, to its end, on an H200, with gpu_score_calls.sh; the others were rehearsed on CPU.
# A call has MINUTES, all told. It trains, evaluates in what it has kept for that, and leaves in OUT
#   run/     the run: checkpoint/ (adapters), states/, metrics.jsonl, transcripts.txt
#   eval/    base_*.json and trained_STEP_*.json: figures and conversations; *.log: the first ones
#   data/    what was trained on, and what was held out
# What the clock cuts off, the same line goes on with: here, or elsewhere with STATE=OLD_OUT.
root=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then PYTHON=$root/.venv/bin/python; [ -x "$PYTHON" ] || PYTHON=python3; fi
MINUTES=${MINUTES:-13}
STATE=${STATE:-}
LIMIT=${LIMIT:-200}  # held-out problems of an evaluation

stop() {
  echo "$(basename "$0"): error: $*" >&2
  exit 2
}

check_model() {  # DIR
  [ -f "$1/config.json" ] || stop "MODEL_DIR $1: no config.json there; give a model's directory"
}

check_data() {  # NAME FILE
  [ "$2" = - ] || [ -f "$2" ] || stop "$1 $2: no such file (-: the task's own problems)"
}

seconds_of() {  # NAME MINUTES
  [[ $2 =~ ^[0-9]+(\.[0-9]+)?$ ]] || stop "$1=$2: must be minutes, as 13 or 2.5"
  awk "BEGIN { print int(60 * $2) }"
}

newest() {  # RUN: the name of its newest state, if it has one
  find "$1/states" -maxdepth 1 -name 'step_[0-9]*' -printf '%f\n' 2>/dev/null | sort | tail -n 1
}

# STATE's run goes on in OUT, which gets its newest state and its logs, unless OUT has gone as far.
bring() {
  [ -n "$STATE" ] || return 0
  local from=$STATE theirs ours
  if [ -d "$STATE/run" ]; then from=$STATE/run; fi
  theirs=$(newest "$from") && ours=$(newest "$OUT/run") || true
  [ -n "$theirs" ] || stop "STATE=$STATE: no saved state there (states/step_* or run/states/step_*)"
  mkdir -p "$OUT/eval"
  find "$STATE/eval" -name 'base_*.json' -exec cp -n {} "$OUT/eval" \; 2>/dev/null || true
  if [ -n "$ours" ]; then
    [[ ! $ours < $theirs ]] || stop "OUT=$OUT is at $ours, STATE=$STATE at $theirs: name a new OUT"
    echo "OUT=$OUT is at $ours already: STATE=$STATE, at $theirs, is left alone"
    return 0
  fi
  [ ! -e "$OUT/run" ] || stop "OUT=$OUT/run has no saved state: delete it, or name a new OUT"
  rm -rf "$OUT/run.new"
  mkdir -p "$OUT/run.new/states"
  cp -r "$from/states/$theirs" "$OUT/run.new/states"
  if [ -d "$from/checkpoint" ]; then cp -r "$from/checkpoint" "$OUT/run.new"; fi
  find "$from" -maxdepth 1 -type f ! -name .lock -exec cp {} "$OUT/run.new" \;
  mv "$OUT/run.new" "$OUT/run"
}

# begin FIRST LATER: the shares of the time, in per cent, that are kept for the evaluations where
# base figures are still to be made, and where they are there.
begin() {
  local share=$1 kept=${EVAL_MINUTES:-}
  box=$(seconds_of MINUTES "$MINUTES")
  if [ -n "$kept" ]; then kept=$(seconds_of EVAL_MINUTES "$kept"); fi
  [[ $LIMIT =~ ^[1-9][0-9]*$ ]] || stop "LIMIT=$LIMIT: must be a number of problems"
  bring
  mkdir -p "$OUT/eval" || stop "OUT=$OUT can't be written"
  if [ -e "$OUT/eval/base_sampled.json" ] && [ -e "$OUT/eval/base_greedy.json" ]; then share=$2; fi
  training=$((box - ${kept:-$((box * share / 100))}))
  [ "$training" -gt 0 ] || stop "MINUTES=$MINUTES: the evaluations alone have as many"
  trap conclude EXIT
}

# hold_out TASK FILE COUNT: OUT/data/test.jsonl has the problems with the COUNT lowest hashes of
# their contents, train.jsonl the others: the same ones whatever the file's order, on any machine.
hold_out() {
  mkdir -p "$OUT/data"
  "$PYTHON" - "$root" "$OUT/data" "$@" <<'END' || exit 2
import json, sys
from pathlib import Path

root, out, name, source, count = sys.argv[1:]
sys.path.insert(0, root)
from tasks import TASKS
from tasks.files import read_rows
from tasks.sources import content_hash, naming, parse_row

task, rows = TASKS[name], []
try:
    for where, row in read_rows(source):
        with naming(where):
            rows.append((content_hash(task.key(parse_row(task, row))), row))
    problems = sorted({key for key, _ in rows})
    if len(problems) < 1.5 * int(count):
        raise ValueError(f"{source}: {len(problems)} problems are too few to hold out {count}")
except ValueError as error:
    sys.exit(f"error: {error}")
held = {*problems[: int(count)]}
for part, inside in (("train", False), ("test", True)):
    lines = [json.dumps(row) + "\n" for key, row in rows if (key in held) == inside]
    Path(out, f"{part}.jsonl").write_text("".join(lines))
print(f"{source}: {len(held)} problems held out, {len(problems) - len(held)} to train on")
END
}

# train SCRIPT FLAGS: until the time kept for the evaluations begins. A step that never ends is cut
# off when the whole box does.
train() {
  local left=$((training - SECONDS))
  [ "$left" -gt 0 ] || left=1
  timeout --foreground -k 30 $((box - SECONDS)) "$PYTHON" "$root/$1" "${@:2}" --resume \
    --output_dir "$OUT/run" --max_minutes "$(awk "BEGIN { print $left / 60 }")"
  step=$(newest "$OUT/run")
  step=${step#step_}
  mapfile -t as_run < <(flags_of_run)
}

flags_of_run() {  # those of evaluate.py with which the run was started, a word a line
  "$PYTHON" - "$OUT/run/config.json" <<'END'
import json, sys

names = "task data overlong prompts shots shots_file max_new_tokens max_reflection_tokens"
names += " code_timeout code_numpy unsafe cache_tokens dtype"
config = json.load(open(sys.argv[1]))
for name in names.split():
    if config.get(name) is not None:
        print(f"--{name}\n{config[name]}")
END
}

# evaluate NAME FLAGS: eval/NAME.json, if it is not there yet, by the run's flags and these. What is
# cut off keeps its conversations.
failed=0
evaluate() {
  local file=$OUT/eval/$1 left=$((box - SECONDS)) code=0
  [ ! -e "$file.json" ] || return 0
  if [ "$left" -lt 1 ]; then
    echo "eval/$1: no time is left, the same line goes on with it"
    return 0
  fi
  echo "eval/$1: $left seconds are left"
  timeout --foreground -k 15 "$left" "$PYTHON" "$root/evaluate.py" "${as_run[@]}" --split test \
    --limit "$LIMIT" --output "$file.json" "${@:2}" >"$file.log" 2>&1 || code=$?
  if [ -e "$file.json" ]; then return 0; fi
  tail -n 1 "$file.log" >&2
  [ "$code" = 124 ] || failed=1  # 124: the time was up
}

# The figures of all evaluations as a table, and what there is to take along, with its size in KiB.
conclude() {
  local code=$?
  (
    cd "$OUT"
    "$PYTHON" - "$root" <<'END' | tee figures.md || true
import json, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from report.tables import format_table

found = {}
for path in sorted(Path("eval").glob("*.json")):
    name, _, mode = path.stem.rpartition("_")
    found.setdefault(name, {})[mode] = json.loads(path.read_text())
columns = ["acc_t1", "acc_t2", "delta", "i_to_c", "c_to_i", "retry_given_failure", "well_formed"]
print(format_table(found, columns))
END
    find . -type f -printf '%k %P\n' | sort -k 2
    du -sk .
  )
  [ "$code" != 0 ] || code=$failed
  exit "$code"
}
