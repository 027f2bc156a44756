"""What a run says before its first step: in six lines, what it is about to do.

One of them, what its probe has found, is said in setup.py. A seventh says what was chosen to fit
another model than the embedded one.
"""

import json
import shutil
from pathlib import Path

import torch

from training import distributed, lora
from training.distributed import rank, world
from training.progress import about

SHOWN = 160  # characters of a prompt's beginning, and as many of its end


def announce(config, env, sampler, splits: dict[str, list]) -> None:
    """All lines but the last, as soon as they are known: before a probe that may take minutes."""
    count, exported = trained(config, sampler.model)
    if rank() > 0:
        return
    model, first = sampler.model, next(iter(splits.values()))
    counts = ", ".join(f"{len(problems):,} {name}" for name, problems in splits.items())
    beside = f", and {count:,} of adapters (rank {config.lora_rank})" if config.lora_rank else ""
    print(f"model   {config.model}: {parameters(model):,} parameters{beside}, {machine(model)}")
    print(f"task    {config.task}: {counts} problems; {config.steps:,} steps of {config.rows} rows")
    if config.chosen:
        print(f"chosen  {chosen(config)}")
    print(f"prompt  {shortened(env.tokenizer.decode(env.prompts(first[:1])[0]))}")
    print(f"run     {config.output_dir}, {disk(config, count, exported)}")
    if config.warmup >= config.steps:
        print(
            f"note    --warmup {config.warmup}: the learning rate rises to the very end of this run"
        )


def trained(config, model) -> tuple[int, int]:
    """(how many parameters are trained, bytes of the best model in a saved state)"""
    weights = parameters(model) * model.saved_dtype.itemsize
    if not config.lora_rank:
        return parameters(model), weights
    count = lora.count(model, config.lora_rank)
    return count, weights if config.lora_merged else 4 * count


def parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def machine(model) -> str:
    """What a model computes in, and on what."""
    device = model.device
    name = f"{torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    ranks = f", {world()} ranks" if distributed.launched() else ""
    return f"{str(model.dtype).removeprefix('torch.')} on {device.type} ({name}{ranks})"


def chosen(config) -> str:
    """The flags that fit the model (training/fitting.py): as they could be given, and whose."""
    whose = {}
    method = getattr(config, "method", None)
    unused = "max_reflection_tokens" if method == "self_correct" else None
    for name, owner in config.chosen.items():
        if name == unused:
            continue
        whose.setdefault(owner, []).append(f"--{name} {getattr(config, name)}")
    return "; ".join(f"{' '.join(flags)} ({owner})" for owner, flags in whose.items())


def shortened(text: str) -> str:
    """On one line, as a JSON string; without the middle if it is long."""
    if len(text) > 2 * SHOWN:
        text = f"{text[:SHOWN]} ... {text[-SHOWN:]}"
    return json.dumps(text, ensure_ascii=False)


def disk(config, count: int, exported: int) -> str:
    """What a run takes on disk, at most, and what is free.

    count, exported: of `trained`. A state has what is trained and two moments of it in float32, the
    reference if it is not --model, and the best model as of then; the next
    one is written before the oldest goes.
    """
    own_reference = getattr(config, "reference", "base") == "stage1"
    needed = (config.keep + 1) * ((16 if own_reference else 12) * count + exported)
    path = Path(config.output_dir).absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    return f"takes up to {size(needed)} of the {size(free)} free on its disk"


def size(count: float) -> str:
    """Bytes, as people say them: 8.4 GB."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB" if count < 1000 else f"{count:,.0f} GB"


def announce_time(config, pace: float | None, validation: int) -> None:
    """The last line. pace: seconds a conversation of the probe, None without one.

    A guess: what a row of a step takes, update and all, was 0.7 of the probe's conversation with
    models/tiny on a CPU, where many rows at once are cheap, and 3 with SmolLM2-135M, where updates
    are not.
    """
    if rank() > 0:
        return
    if pace is None:
        print("time    not known before the first steps")
        return
    evaluations = config.steps // config.eval_every if config.eval_every else 0
    looks = evaluations * min(config.eval_problems, validation) + config.passes * validation
    least, most = (about(pace * (each * config.steps * config.rows + looks)) for each in (0.7, 3))
    said = least if least == most else f"{least} to {most.removeprefix('about ')}"
    print(f"time    {said}, a guess from the probe that the bar will correct")
