"""Memory by the formula of memory.py beside what a real step takes: SCoRe's or RRR's, on a CPU.

    python bench/measure_memory.py --size 100M --script score --lora 16

One step of 16 rows in micro-batches of 8, of a random model, with made-up prompts and verdicts, as
after the first one, when there are moments: the script's own rollout, advantages and update.
Counted are the bytes of all tensors that are alive, and beside them the process's memory, beyond
what it has after its imports.
"""

import gc
import tempfile
import weakref
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from common import finish, flag, parse_args, peak_mib, print_table, resident_mib
from memory import How, Load, Shape, parts
from sampler import Sampler
from tasks.env import Verdicts
from tiny import build_tokenizer
from training import distributed
from training.batches import share_of
from training.checkpoint import save_model
from training.models import compute_dtype, hand_over, load_model, make_scorer
from training.policy import update

SIZES = {  # V, H, L, A, K, F: small enough for a test; a small Llama; Qwen2.5-0.5B
    "5M": (4000, 256, 6, 4, 2, 704),
    "100M": (32000, 768, 12, 12, 12, 2048),
    "500M": (151936, 896, 24, 14, 2, 4864),
}
PROMPT, SEAM, ANSWER = 100, 12, 32  # tokens: of a first prompt, of a further one, of an answer
ROWS, GROUPS = 16, 4  # a step's, and the prompts or failures that they begin with
PHASES = ("sampling", "updating")


@dataclass
class Config:
    size: str = flag("100M", "of the model, in parameters, about", choices=tuple(SIZES))
    script: str = flag("score", "whose step", choices=("score", "rrr"))
    lora: int | None = flag(None, "of the adapters that are trained; default: the weights")
    checkpointing: bool = flag(False, "compute the activations again in the backward pass")
    dtype: str = flag("float32", "float32 or bfloat16", choices=("float32", "bfloat16"))

    device = "cpu"


class Live(TorchDispatchMode):
    """Bytes of all tensors that operations have touched and that are alive: `now` and `peak`.

    Storages are what is counted, each once, however many tensors look at it.
    """

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __enter__(self):
        self.resize = resize = torch.UntypedStorage.resize_

        def resized(storage, size):  # FSDP gives memory back that its tensors still point to
            resize(storage, size)
            self.count(storage)

        torch.UntypedStorage.resize_ = resized
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self.count(getattr(tensor, "_local_tensor", tensor).untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def count(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.sizes:
            weakref.finalize(storage, self.forget, key).atexit = False
        self.now += size - self.sizes.get(key, 0)
        self.sizes[key] = size

    def forget(self, key) -> None:
        self.now -= self.sizes.pop(key)


def build(size: str, path: Path) -> Shape:
    """Saves a random model."""
    V, H, L, A, K, F = SIZES[size]
    sizes = {"vocab_size": V, "hidden_size": H, "num_hidden_layers": L, "intermediate_size": F}
    sizes |= {"num_attention_heads": A, "num_key_value_heads": K, "max_position_embeddings": 1024}
    ends = {"bos_token_id": None, "eos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **ends, tie_word_embeddings=True))
    save_model(model, build_tokenizer(), path)
    return Shape(sum(p.numel() for p in model.parameters()), V, H, L, A, K, H // A, F, True)


def flags_and_load(config: Config, path: str):
    """(the script's own config, what its step works on), by arithmetic on the lengths."""
    each, shared = ROWS // GROUPS, {"model": path, "max_new_tokens": ANSWER, "dtype": config.dtype}
    shared |= {"lora_rank": config.lora, "checkpointing": config.checkpointing}
    if config.script == "score":  # 2 first attempts, 2 second ones of each
        own = {"problems": GROUPS, "group_size": 2, "second_attempts": each // 2}
        width = PROMPT + ANSWER + SEAM + ANSWER
        before = 2 * GROUPS * (PROMPT + ANSWER)
        nodes, scored = PROMPT + 2 * (ANSWER + SEAM) + each * ANSWER, (2 + each) * ANSWER
    else:  # 4 reflections on a failure, a retry of each
        own = {"failures_per_step": GROUPS, "group_size": each, "max_reflection_tokens": ANSWER}
        before = ROWS * (PROMPT + ANSWER + SEAM + ANSWER)
        width = before // ROWS + SEAM + ANSWER
        nodes = PROMPT + ANSWER + SEAM + each * (ANSWER + SEAM + ANSWER)
        scored = ANSWER + each * 2 * ANSWER
    load = Load(ROWS * width, before, ROWS, ROWS * SEAM, 2 * nodes, 2 * each * width, 2 * scored)
    make = import_module(config.script).Config
    return make(**own, **shared, token_budget=2 * each * width), load


def made_up(vocabulary: int):
    """An Env whose messages are random words, and which finds every other answer right."""

    def words(count: int) -> list[int]:
        return torch.randint(100, vocabulary, (count,)).tolist()

    def first_attempts(sampler, problems, group_size, seeds, **limits):
        return sampler.generate([words(PROMPT) for _ in problems], group_size, **limits)

    return SimpleNamespace(
        task=SimpleNamespace(given=None),
        words=words,
        first_attempts=first_attempts,
        follow_up=lambda rollout, message: [words(SEAM) for _ in rollout.lengths],
        verdicts=lambda rollout, *_: Verdicts(
            (x := torch.arange(len(rollout.ids)) % 2.0), [], [], x
        ),
    )


def batch_of(name: str, env, sampler, config):
    """A step's rollout, and what the algorithm makes of it."""
    script, ids = import_module(name), {"prompt_ids": PROMPT, "answer_ids": ANSWER}
    count = GROUPS * distributed.world()  # a rank has as much to do as one alone
    things = [{key: env.words(n) for key, n in ids.items()} | {"problem": 0} for _ in range(count)]
    rolled_out = script.roll_out(env, sampler, share_of(things, 0), config)
    rolled_out.rollout.cache = None
    return script.make_batch(rolled_out, *((2, 1.0) if name == "score" else ()), config)


def step(config: Config, path: str, flags) -> dict[str, tuple[float, float]]:
    """{phase: MiB of (live tensors, the process)} at their peaks."""
    torch.manual_seed(0)
    gc.collect()
    imports, peaks = resident_mib("VmRSS"), {}
    with Live() as live:
        model, tokenizer = load_model(path, dtype=compute_dtype(flags))
        sampler = Sampler(model, tokenizer)
        sampler.is_stop.zero_()  # every answer has the same length
        scorer = make_scorer(model, flags)
        for parameter in scorer.trained.parameters():  # moments that move nothing
            parameter.grad = torch.zeros_like(parameter)
        optimizer = torch.optim.AdamW(scorer.trained.parameters(), weight_decay=0.0, fused=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        hand_over(scorer, sampler)

        def phase(name, function):
            gc.collect()
            live.peak = live.now
            peak_mib()
            result = function()
            peaks[name] = live.peak / 2**20, peak_mib() - imports
            return result

        env = made_up(model.config.vocab_size)
        batch = phase("sampling", lambda: batch_of(config.script, env, sampler, flags))
        if distributed.together() and scorer.adapters is None:
            distributed.drop_weights(model)
        done = phase("updating", lambda: update(scorer, optimizer, batch, flags))
        if done.wrong or done.idle:
            raise RuntimeError(f"the step did nothing: {done.wrong}")
    return peaks


def measure(config: Config) -> dict[str, dict[str, float]]:
    """{phase: MiB by the formula, of live tensors, of the process, and formula / live}."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model"
        shape = build(config.size, path)
        flags, load = flags_and_load(config, str(path))
        distributed.start(flags)
        peaks = step(config, str(path), flags)
    grouped = distributed.world() if distributed.together() else None
    c = 4 if config.dtype == "float32" else 2
    how = How(grouped, config.lora or 0, c, config.checkpointing, cpu=True)
    by = parts(shape, load, how)
    rows = {}
    for name, (live, process) in peaks.items():
        formula = (by["always"] + by[name]) / 2**20
        row = {"formula": formula, "live": live, "process": process, "ratio": formula / live}
        rows[name] = {key: round(value, 3 if key == "ratio" else 1) for key, value in row.items()}
    return rows


def main(config: Config) -> None:
    phases = measure(config)
    header = ("MiB", "formula", "live tensors", "the process", "formula / live")
    print_table(header, [(name, *row.values()) for name, row in phases.items()])
    finish(config, phases=phases)


if __name__ == "__main__":
    main(parse_args(Config))
