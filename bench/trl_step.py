"""The other half of bench_grpo.py: `trl_step.py JOB.json` times steps of TRL's GRPOTrainer.

It runs in TRL's own environment and imports nothing of this project. Lengths are forced where
transformers lets a caller do so: a logits processor bans the stop token before a row's length and
leaves nothing else at it.
"""

import json
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset
from transformers import LogitsProcessor, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class ForceLengths(LogitsProcessor):
    """Row i of a batch of len(lengths) samples exactly lengths[i] tokens, stop token included."""

    def __init__(self, lengths, stop_ids):
        self.lengths, self.stop_ids, self.start = lengths, stop_ids, None

    def __call__(self, input_ids, scores):
        if self.start is None:
            self.start = input_ids.shape[1]
        last = [i for i, n in enumerate(self.lengths) if n == input_ids.shape[1] - self.start + 1]
        scores[:, self.stop_ids] = -torch.inf
        scores[last] = -torch.inf
        scores[last, self.stop_ids[0]] = 0.0
        return scores


class Clock(TrainerCallback):
    """Wall time of whole steps."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *args, **kwargs):
        self.started = now()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(now() - self.started)


def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def memory_mib(job, line):
    """Of the GPU if the work is done there, else of this process: VmHWM the peak, VmRSS now."""
    if job["device"].startswith("cuda"):
        cuda = torch.cuda
        count = cuda.max_memory_allocated if line == "VmHWM" else cuda.memory_allocated
        return count() / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    entries = dict(entry.split(":", 1) for entry in lines)
    return int(entries[line].split()[0]) / 2**10


def make_trainer(job, output_dir, clock):
    rng = random.Random(job["seed"])
    micro = job["micro"] or len(job["lengths"])
    config = GRPOConfig(
        output_dir=output_dir,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=len(job["lengths"]) // micro,
        steps_per_generation=len(job["lengths"]) // micro,
        num_generations=job["group_size"],
        max_completion_length=max(job["lengths"]),
        beta=job["beta"],
        learning_rate=job["lr"],
        max_steps=job["steps"] + 1,
        gradient_checkpointing=job["checkpointing"],
        bf16=False,  # no autocast: weights and arithmetic have the job's dtype, as ours
        model_init_kwargs={"dtype": job["dtype"]},
        use_cpu=job["device"] == "cpu",
        shuffle_dataset=False,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        seed=job["seed"],
    )
    return GRPOTrainer(
        model=job["model"],
        reward_funcs=lambda completions, **kwargs: [rng.random() for _ in completions],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in job["prompts"]]),
        callbacks=[clock],
    )


def timed_generate(generate, job, stop_ids, calls, **inputs):
    """`generate` with forced lengths; notes its time and how many tokens went in and came out."""
    started = now()
    out = generate(**inputs, logits_processor=[ForceLengths(job["lengths"], stop_ids)])
    completions = out[:, inputs["input_ids"].shape[1] :]
    stops = torch.isin(completions, torch.tensor(stop_ids, device=out.device))
    sampled = int((stops.int().cumsum(1) - stops.int() == 0).sum())  # up to a row's first stop
    prompt = int(inputs["attention_mask"].sum())
    calls.append({"seconds": now() - started, "prompt": prompt, "sampled": sampled})
    return out


def main(path):
    job, clock, calls = json.loads(Path(path).read_text()), Clock(), []
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = make_trainer(job, output_dir, clock)
        model = trainer.model
        model.generate = partial(timed_generate, model.generate, job, trainer.eos_token_ids, calls)
        loaded = memory_mib(job, "VmRSS")
        trainer.train()
    result = {"seconds": clock.seconds[1:], "rollout": [call["seconds"] for call in calls[1:]]}
    result |= {"loaded_mib": loaded, "peak_mib": memory_mib(job, "VmHWM")}
    result |= {"prompt_tokens": calls[-1]["prompt"], "sampled_tokens": calls[-1]["sampled"]}
    print(json.dumps(result | {"trl": trl.__version__, "transformers": transformers.__version__}))


if __name__ == "__main__":
    main(sys.argv[1])
