"""What must be right before a number means anything; each check says its tolerance.

Log-probs in nats, always of tokens that were sampled beside a plain forward pass over the same ids.
Two ways to sample need not draw the same: where 32,000 words share the mass, rounding tips a draw
now and then in float32, and in bfloat16 after a few tokens.
"""

from functools import partial
from importlib import import_module

import torch
from transformers import AutoModelForCausalLM

from gpu_parts.lines import device, gpu, timed, wrong
from gpu_parts.models import NAMES, make_sampler, path_of, paths, prompts_of, random_model
from sampler import fast
from sampling import draws
from training.models import cast
from training.scorer import Scorer

DTYPES = {  # how far log-probs may be off: the largest, and the mean
    torch.float32: (2e-4, 2e-5),
    torch.bfloat16: (0.2, 0.03),  # on a CPU 0.08 and 0.018
}
SPREAD = 0.04  # of weights: attention and logits that are far from uniform


def correct(part):
    model = random_model(part, "0.5B", torch.float32, layers=4, vocabulary=32000, spread=SPREAD)
    rows = [
        prompt[: 40 + 13 * i] for i, prompt in enumerate(prompts_of(3 if part.small else 6, 105))
    ]
    for dtype in DTYPES:
        cast(model, dtype)
        for check in (two_turns, all_paths, scorer_agrees):
            part.measure(f"{check.__name__} {dtype}", check, model, rows)
    cast(model, torch.float32)
    part.measure("draws", draws_are_fair, 50 if part.small else 32000)
    part.measure("gradient", gradient, part, rows)
    for dtype in DTYPES:
        part.measure(f"twice {dtype}", twice, cast(model, dtype), rows)


@torch.no_grad()
def off(model, rollout) -> dict:
    """How far the log-probs of a rollout are from those of a forward pass of transformers."""
    found = []
    for row in range(len(rollout.lengths)):
        length = rollout.lengths[row]
        ids, mask = rollout.ids[row, :length], rollout.action_mask[row, 1:length]
        hidden = model.get_decoder()(input_ids=ids[None]).last_hidden_state[0, :-1][mask]
        logits = hidden.float() @ model.get_output_embeddings().weight.float().T
        expected = logits.log_softmax(-1).gather(1, ids[1:][mask][:, None])[:, 0]
        found.append((expected - rollout.logprobs[row, 1:length][mask]).abs())
    return sizes(torch.cat(found))


def sizes(differences) -> dict:
    return {"worst": float(differences.max()), "mean": float(differences.mean())}


def within(found: dict, dtype) -> bool:
    worst, mean = DTYPES[dtype]
    return found["worst"] < worst and found["mean"] < mean


def two_turns(model, rows) -> dict:
    """The sampler as it is: a second turn goes on from the first one's cache."""
    sampler = make_sampler(model)
    one = sampler.generate(rows, 2, max_new_tokens=24)
    two = sampler.extend(one, [[7, 8, 9]] * len(one.lengths), 2, max_new_tokens=20)
    found, fast = off(model, two), not gpu() or all(path_of(sampler).values())
    fine = wrong(log_probs=within(found, model.dtype), path_is_not_the_fast_one=fast)
    return found | {"tolerance": DTYPES[model.dtype], **path_of(sampler)} | fine


def all_paths(model, rows) -> dict:
    """Each path on rows of 17 lengths: many sizes of batch, two widths of the cache."""
    limits = [5 + 9 * (i % 17) for i in range(8 * len(rows))]
    made = paths(model)
    runs = {name: made[name].generate(rows, 8, max_new_tokens=limits) for name in made}
    return compared(model, runs)


def compared(model, runs: dict) -> dict:
    """What is `off` of each rollout, and its share of tokens before it parts from the last one.

    That share is above a half in float32: rows part when a draw tips, and stay apart.
    """
    found, fine, exact = {}, {}, model.dtype == torch.float32
    for name, rollout in runs.items():
        found[name] = off(model, rollout) | {"same_tokens": alike(rollout, list(runs.values())[-1])}
        same = found[name]["same_tokens"] > 0.5 or not exact
        fine[name.replace(" ", "_")] = within(found[name], model.dtype) and same
    return found | {"tolerance": DTYPES[model.dtype]} | wrong(**fine)


def alike(one, other) -> float:
    """Share of sampled tokens up to where rows part."""
    mask = one.action_mask
    same = ((one.ids == other.ids) | ~mask).long().cumprod(1).bool() & mask
    return int(same.sum()) / int(mask.sum())


@torch.no_grad()
def scorer_agrees(model, rows) -> dict:
    """What a run logs as ratio_error: the scorer's log-probs beside the sampler's."""
    rollout = make_sampler(model).generate(rows, 8, max_new_tokens=32)
    scores = Scorer(model)(rollout.ids, rollout.action_mask)
    found = sizes((scores.logprobs - rollout.logprobs)[rollout.action_mask].abs())
    fine = wrong(log_probs=within(found, model.dtype))
    return found | {"tolerance": DTYPES[model.dtype]} | fine


def draws_are_fair(words: int, count: int = 20000) -> dict:
    """Uniforms as on a CPU, bit for bit; and how often the 20 likeliest words are drawn."""
    seeds, places = torch.arange(4096) * 7919, torch.arange(4096) % 333
    here = draws.uniform(seeds.to(device()), places.to(device()))
    bits = torch.equal(draws.uniform(seeds, places), here.cpu())
    logits = torch.randn(1, words, generator=torch.Generator().manual_seed(0)).to(device())
    u = draws.uniform(torch.arange(count), torch.zeros(count, dtype=torch.int64)).to(device())
    p = logits[0].double().softmax(-1)
    top, z = p.topk(20).indices, {}
    ways = {"plain": draws.sample}
    if gpu():
        ways["kernels"] = import_module("fast.cuda_draw").sample
    for name, sample in ways.items():
        pieces = [sample(logits.expand(len(some), -1), 1.0, some)[0] for some in u.split(2000)]
        shares = (torch.cat(pieces)[:, None] == top).double().mean(0)
        z[name] = float(((shares - p[top]) / (p[top] * (1 - p[top]) / count).sqrt()).abs().max())
    fine = wrong(uniforms_as_on_a_CPU=bits, shares=max(z.values()) < 5)
    return {"largest_z_of_20": z} | fine


def gradient(part, rows) -> dict:
    """Of log-probs and KL, in float32, here, beside the same in float64 on the CPU."""
    model = random_model(part, "0.5B", torch.float32, layers=2, vocabulary=2000, spread=SPREAD)
    rollout, found = make_sampler(model).generate(rows, 4, max_new_tokens=12), []
    weights = torch.randn(rollout.ids.shape, generator=torch.Generator().manual_seed(3))
    for where, dtype in ((device(), torch.float32), ("cpu", torch.float64)):
        make = partial(AutoModelForCausalLM.from_config, model.config, dtype=dtype)
        twin, other = make().to(where), make().to(where)
        twin.load_state_dict(model.state_dict())
        other.load_state_dict({k: 0.9 * v for k, v in model.state_dict().items()})
        scores = Scorer(twin, other)(rollout.ids.to(where), rollout.action_mask.to(where))
        (scores.logprobs * weights.to(where) + scores.kl).sum().backward()
        found.append(torch.cat([p.grad.flatten().double().cpu() for p in twin.parameters()]))
    difference = float((found[0] - found[1]).norm() / found[1].norm())
    kernels = not gpu() or (fast and fast.score_of(torch.device(device())) is not None)
    fine = wrong(gradient=difference < 1e-3, without_kernels=bool(kernels))
    return {"relative": difference, "tolerance": 1e-3} | fine


def twice(model, rows) -> dict:
    """Whether the same update is the same twice: not required, index_select adds with atomics."""
    rollout, found = make_sampler(model).generate(rows, 8, max_new_tokens=16), []
    for _ in range(2):
        model.zero_grad()
        Scorer(model)(rollout.ids, rollout.action_mask).logprobs.sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    model.zero_grad()
    difference = float((found[0] - found[1]).float().norm() / found[0].float().norm())
    return {"same_bits": torch.equal(*found), "relative": difference}


def kernels(part):
    """Decoding with the kernels of fast/ beside torch's operations: right, and how fast.

    On random models, from lengths of 1 to 700, in each dtype and head size. What Triton has against
    a kernel is the first line's error: a sampler only warns, and does without.
    """
    if not gpu():
        return part.skip("kernels", "they take a GPU")
    for name in NAMES:  # heads of 128, of 64
        model = random_model(part, name, torch.float32, 4, vocabulary=32000, spread=SPREAD)
        for dtype in DTYPES:
            cast(model, dtype)
            part.measure(f"{name} {dtype} alone", kernels_alone, model)
            samplers = {on: make_sampler(model, kernels=on, graphs=False) for on in (True, False)}
            if not samplers[True].kernels:
                part.skip(f"{name} {dtype}", "the sampler has no kernels here")
                continue
            part.measure(f"{name} {dtype} agree", kernels_agree, model, samplers)
            part.measure(f"{name} {dtype} times", kernels_times, samplers)


@torch.no_grad()
def kernels_alone(model) -> dict:
    ids = torch.arange(2, device=model.device)[None]
    step, logits = import_module("fast.cuda_step"), model(ids).logits[:, -1].float()
    error = step.error_of(model, ids, logits)
    return {"relative": error} | wrong(logits=error < step.relative_error(model.dtype))


def kernels_agree(model, samplers: dict) -> dict:
    lengths = [1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 300, 511, 512, 513, 640, 680]
    prompts = [row[:length] for row, length in zip(prompts_of(len(lengths), 680), lengths)]
    names = {"kernels": samplers[True], "plain": samplers[False]}
    return compared(model, {k: s.generate(prompts, 2, max_new_tokens=20) for k, s in names.items()})


def kernels_times(samplers: dict) -> dict:
    """ms a step of 64 rows with 448 tokens on average, of 4 layers, not captured."""
    prompts, found = prompts_of(64, 400), {}
    for on, sampler in samplers.items():
        few, many = (partial(sampler.generate, prompts, max_new_tokens=n) for n in (17, 81))
        found["kernels" if on else "plain"] = 1e3 * (timed(many, 3, 1) - timed(few, 3, 1)) / 64
    return found
