"""The loss without the logits: time and memory of `loss.token_scores` against plain full logits.

    python bench/bench_update.py

Forward and backward of log-probs and the exact KL to a reference, from hidden states to the
gradients of hidden states and head. Each measurement has a process of its own; memory is what its
resident size grows by over its inputs. A plain run that does not fit is left out, with the memory
that it would take by extrapolation from the largest one that ran.
"""

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from common import (
    BenchConfig,
    clock,
    finish,
    flag,
    last_json,
    memory_mib,
    parse_args,
    print_table,
    ratio,
    resident_mib,
    spread,
)
from loss import token_scores

KINDS = ("chunked", "plain")
PLAIN_COPIES = 6  # (tokens, vocabulary) float32 tensors that the plain way holds at its peak


@dataclass
class Config(BenchConfig):
    dtype: str | None = flag("float32", "float32 or bfloat16, of hidden states and head")
    tokens: str = flag("1024,2048,4096,8192", "sampled tokens of a micro-batch")
    vocabularies: str = flag("32000,150000", "vocabulary sizes")
    hidden_size: int = flag(256, "H")
    worker: str | None = flag(None, "for this script's own use: the job of one of its processes")


def plain_scores(hidden, head, tokens, ref_hidden, ref_head):
    """(log-probs, KL) the way it is written on paper: all logits of both models at once."""
    logp = (hidden @ head.T).float().log_softmax(-1)
    with torch.no_grad():
        ref_logp = (ref_hidden @ ref_head.T).float().log_softmax(-1)
    kl = (logp.exp() * (logp - ref_logp)).sum(-1)
    return logp.gather(-1, tokens[:, None])[:, 0], kl


def draw_inputs(job: dict, count: int):
    generator = torch.Generator().manual_seed(job["seed"])
    dtype, device = getattr(torch, job["dtype"]), job["device"]

    def normal(rows: int, scale: float):
        drawn = torch.randn(rows, job["hidden_size"], generator=generator)
        return drawn.mul_(scale).to(device, dtype)

    vocabulary = job["vocabulary"]
    hidden, head = normal(count, 1.0).requires_grad_(), normal(vocabulary, 0.1).requires_grad_()
    tokens = torch.randint(vocabulary, (count,), generator=generator).to(device)
    weights = torch.randn(2, count, generator=generator).to(device)
    return (hidden, head, tokens, normal(count, 1.0), normal(vocabulary, 0.1)), weights


def forward_backward(kind: str, inputs: tuple, weights) -> None:
    scores = token_scores(*inputs) if kind == "chunked" else None
    logprobs, kl = (scores.logprobs, scores.kl) if scores else plain_scores(*inputs)
    (logprobs * weights[0] + kl * weights[1]).sum().backward()


def work(job: dict) -> dict:
    """One measurement; the gradients go to a file."""
    forward_backward(job["kind"], *draw_inputs(job, 64))  # loads the libraries
    inputs, weights = draw_inputs(job, job["tokens"])
    before = memory_mib(job["device"], peak=False)
    seconds, _ = clock(lambda: forward_backward(job["kind"], inputs, weights), job["device"])
    grown = memory_mib(job["device"]) - before
    torch.save([x.grad.float().cpu() for x in inputs[:2]], job["gradients"])
    return {"seconds": seconds, "grown_mib": grown}


def fits(kind: str, tokens: int, vocabulary: int, config: Config) -> bool:
    needed = PLAIN_COPIES * tokens * vocabulary * 4 / 2**20
    if config.device.startswith("cuda"):
        return kind == "chunked" or needed < torch.cuda.mem_get_info()[0] / 2**20
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) / 2**10 for line in lines if line.startswith("MemAvailable"))
    return kind == "chunked" or needed < free - resident_mib()


def measure(tokens: int, vocabulary: int, config: Config, directory: str) -> dict:
    """{kind: {seconds: [...], grown_mib: [...]}} and the gradients' difference.

    A kind that doesn't fit is missing, and the difference with it.
    """
    runs, paths = {}, {kind: Path(directory) / f"{kind}.pt" for kind in KINDS}
    for _ in range(config.repeats):
        for kind in KINDS:
            if not fits(kind, tokens, vocabulary, config):
                continue
            job = asdict(config) | {"kind": kind, "vocabulary": vocabulary, "tokens": tokens}
            job["gradients"] = str(paths[kind])
            done = last_json([sys.executable, __file__, "--worker", json.dumps(job)])
            for key, value in done.items():
                runs.setdefault(kind, {}).setdefault(key, []).append(value)
    if "plain" in runs:
        pairs = zip(*(torch.load(paths[kind]) for kind in KINDS), strict=True)
        runs["difference"] = [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]
    return runs


def row(tokens: int, vocabulary: int, runs: dict, scale: float | None) -> tuple:
    chunked, plain, difference = runs["chunked"], runs.get("plain"), runs.get("difference")
    left_out = "does not fit" + (f", about {scale * tokens:.0f}" if scale else "")
    return (
        vocabulary,
        tokens,
        spread(chunked["seconds"]),
        spread(plain["seconds"]) if plain else "-",
        spread(chunked["grown_mib"], 0),
        spread(plain["grown_mib"], 0) if plain else left_out,
        f"{difference[0]:.0e}, {difference[1]:.0e}" if difference else "-",
    )


def main(config: Config) -> None:
    table, figures, worst = [], {}, 0.0
    with tempfile.TemporaryDirectory() as directory:
        for vocabulary in map(int, config.vocabularies.split(",")):
            scale = None  # MiB a token of the largest plain run so far
            for tokens in map(int, config.tokens.split(",")):
                runs = measure(tokens, vocabulary, config, directory)
                if plain := runs.get("plain"):
                    chunked, name = runs["chunked"], f"{vocabulary}_{tokens}"
                    scale = median(plain["grown_mib"]) / tokens
                    figures[f"speedup_{name}"] = ratio(plain["seconds"], chunked["seconds"])
                    memory = ratio(plain["grown_mib"], chunked["grown_mib"])
                    figures[f"memory_ratio_{name}"] = memory
                    worst = max(worst, *runs["difference"])
                table.append(row(tokens, vocabulary, runs, scale))
    sizes, times = ("vocabulary", "tokens"), ("chunked, s", "plain, s")
    print_table((*sizes, *times, "chunked, MiB", "plain, MiB", "gradients differ by"), table)
    print("\nThe largest difference of a gradient over its largest entry: hidden states, head.")
    finish(config, **figures, gradient_difference=worst)


if __name__ == "__main__":
    config = parse_args(Config)
    if config.worker:
        print(json.dumps(work(json.loads(config.worker))))
    else:
        main(config)
