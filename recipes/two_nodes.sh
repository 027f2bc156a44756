#!/usr/bin/env bash
# Rehearsed on CPU (gloo, two agents of one machine, Slurm's commands faked); not on GPUs.
#SBATCH --job-name=score --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --requeue
# SCoRe on two nodes that share their file system; each keeps a copy of the weights (--hsdp 2):
#   HOST=first-node recipes/two_nodes.sh    on each node, the same line
#   sbatch recipes/two_nodes.sh             from the repository, with Slurm
# Called again, or queued again, it goes on where it was stopped.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# sbatch runs a copy of this file that lies elsewhere
if [ ! -e "$root/score.py" ]; then root=${SLURM_SUBMIT_DIR:?not in the repository}; fi
if [ -z "${PYTHON:-}" ]; then PYTHON=$root/.venv/bin/python; [ -x "$PYTHON" ] || PYTHON=python3; fi
MODEL=${MODEL:-Qwen/Qwen2.5-7B-Instruct}
TASK=${TASK:-countdown}
OUT=${OUT:-$root/runs/two_nodes}
NPROC=${NPROC:-8}
PORT=${PORT:-29500}

on_each=(env)
if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
  HOST=${HOST:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
  on_each=(srun)
fi
: "${HOST:?name the first node, the same on both}"

"${on_each[@]}" "$PYTHON" -m torch.distributed.run --nnodes 2 --nproc-per-node "$NPROC" \
  --rdzv-backend c10d --rdzv-id "${SLURM_JOB_ID:-1}" --rdzv-endpoint "$HOST:$PORT" \
  "$root/score.py" --model "$MODEL" --task "$TASK" --output_dir "$OUT" --hsdp 2 --resume "$@"
