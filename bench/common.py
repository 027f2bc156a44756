"""What timing scripts share: flags, models, workloads, clocks, tables, the JSON line at the end.

Imported first, since it puts the root, where the rest lies, on the path.
"""

import json
import math
import platform
import random
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    StaticCache,
    StoppingCriteria,
)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from training.flags import flag, parse_args  # noqa: E402, F401
from training.models import cast, load_model  # noqa: E402


@dataclass
class BenchConfig:
    """The flags that every timing script shares."""

    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "where to run")
    dtype: str | None = flag(None, "float32 or bfloat16; default: bfloat16 on a GPU, else float32")
    repeats: int = flag(3, "rounds; in each of them everything compared runs once, in turn")
    seed: int = flag(0, "seed of the workload")

    def __post_init__(self):
        self.dtype = self.dtype or ("float32" if self.device == "cpu" else "bfloat16")


def load(name: str, config: BenchConfig, positions: int = 0):
    """(model, tokenizer); conversations may have `positions` tokens, trained on such or not."""
    model, tokenizer = load_model(name, config.device)
    return ready(model, config, positions), tokenizer


def ready(model, config: BenchConfig, positions: int = 0):
    cast(model.to(config.device), getattr(torch, config.dtype)).eval()
    text = model.config.get_text_config()  # rotary positions have no limit of their own
    text.max_position_embeddings = max(text.max_position_embeddings, positions)
    # no stop tokens, penalties or limits that a benchmark doesn't see
    model.generation_config = GenerationConfig()
    return model


def draw_ids(rng: random.Random, length: int, vocabulary: int) -> list[int]:
    return [rng.randrange(vocabulary) for _ in range(length)]


def draw_lengths(rng: random.Random, count: int, median: float, longest: int) -> list[int]:
    """Response lengths, log-normal as those of a model that may think, clipped to 1..longest."""
    drawn = (rng.lognormvariate(math.log(median), 0.8) for _ in range(count))
    return [min(longest, max(1, round(length))) for length in drawn]


def clock(function, device: str):
    """(seconds, result), with the device's queue empty before and after."""
    synchronize(device)
    started = time.perf_counter()
    result = function()
    synchronize(device)
    return time.perf_counter() - started, result


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def left_padded(rows: list[list[int]], width: int, device: str):
    """(ids, attention mask), both (n, width)."""
    ids = [[0] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def generate_options(cache: str, temperature: float, max_new_tokens: int) -> dict:
    """For `model.generate`: a dynamic, static or compiled static cache, no stop token."""
    settings = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0, "pad_token_id": 0}
    if temperature > 0:
        settings |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    if cache != "dynamic":
        settings |= {"cache_implementation": "static", "disable_compile": cache != "compiled"}
    if cache == "compiled":
        settings["compile_config"] = CompileConfig()
        settings["compile_config"]._compile_all_devices = True  # by itself: accelerators only
    return {"generation_config": GenerationConfig(**settings)}


class StepClock(StoppingCriteria):
    """Times generate's steps from the `first` to the `last`: after prefill and compilation."""

    def __init__(self, first: int, last: int, device: str):
        self.first, self.last, self.device, self.calls, self.times = first, last, device, 0, []

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        if self.calls in (self.first, self.last):
            synchronize(self.device)
            self.times.append(time.perf_counter())
        return torch.full((len(input_ids),), self.calls >= self.last, device=input_ids.device)


def generate_step(
    model, cache: str, rows: int, context: int, room: int, temperature: float = 1.0
) -> float:
    """Seconds a step of `model.generate` on `rows` rows that have `context` tokens each.

    A static cache has `room` more. It is filled with noise instead of a prefill, which would take
    longer than what is measured.
    """
    device, config = model.device, model.config.get_text_config()
    if cache == "dynamic":
        filled = DynamicCache(config=config)
    else:
        filled = StaticCache(config=config, max_cache_len=context + room)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (2, rows, config.num_key_value_heads, context, size)
    for layer in range(config.num_hidden_layers):
        filled.update(*torch.randn(shape, device=device, dtype=model.dtype), layer)
    ids = torch.zeros(rows, context + 1, dtype=torch.int64, device=device)
    steps = StepClock(min(4, room - 1), min(12, room), str(device))
    options = generate_options(cache, temperature, room)
    options["generation_config"].cache_implementation = None  # it is given
    options |= {"past_key_values": filled, "stopping_criteria": [steps]}
    model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return (steps.times[1] - steps.times[0]) / (steps.last - steps.first)


def interleave(jobs: dict, repeats: int) -> dict[str, list]:
    """Results of each job, run A B A B ...: what slows the machine for a while slows all alike."""
    results = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            results[name].append(job())
    return results


def resident_mib(line: str = "VmHWM") -> float:
    """This process's peak memory since it started, or with VmRSS its memory now (Linux).

    Unlike ru_maxrss it doesn't start from the peak of the process that started this one.
    """
    for entry in Path("/proc/self/status").read_text().splitlines():
        if entry.startswith(line + ":"):
            return int(entry.split()[1]) / 2**10
    raise OSError(f"/proc/self/status has no {line}")


def peak_mib() -> float:
    """What this process had at most since the last call."""
    peak = resident_mib()
    Path("/proc/self/clear_refs").write_text("5")
    return peak


def memory_mib(device: str, peak: bool = True) -> float:
    """Of the GPU if the work is done there, else of the process."""
    if device.startswith("cuda"):
        count = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
        return count() / 2**20
    return resident_mib("VmHWM" if peak else "VmRSS")


def last_json(command: list) -> dict:
    """What a program of ours says of itself in its last line."""
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: list[float], digits: int = 2) -> str:
    """Median and range."""
    low, high = min(values), max(values)
    between = f" ({low:.{digits}f}-{high:.{digits}f})" if low < high else ""
    return f"{statistics.median(values):.{digits}f}{between}"


def ratio(above: list[float], below: list[float]) -> float | None:
    """Of medians; None where there is nothing below, as of memory that did not grow."""
    if not statistics.median(below):
        return None
    return round(statistics.median(above) / statistics.median(below), 3)


def print_table(header: tuple, rows: list[tuple]) -> None:
    lines = [header, ("---",) * len(header), *rows]
    print("\n".join(f"| {' | '.join(map(str, line))} |" for line in lines), flush=True)


def finish(config, **figures) -> None:
    """The last line: figures, flags, and what they were measured on."""
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    about = {"hardware": hardware(config.device), "threads": torch.get_num_threads()}
    about |= {"torch": torch.__version__, "transformers": transformers.__version__}
    about |= {"commit": commit or None, "flags": asdict(config)}
    print(json.dumps({"bench": Path(sys.argv[0]).stem, **figures, **about}))


def hardware(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0]} x {len(models)}" if models else platform.processor()
