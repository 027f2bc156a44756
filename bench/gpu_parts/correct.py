"""What must be right before a number means anything; each check says its tolerance.

Log-probs in nats. Another kernel's rounding may tip a draw, in bfloat16 often; then a row goes its
own way, so two ways to sample are compared up to there.
"""

from functools import partial

import torch
from transformers import AutoModelForCausalLM

from gpu_parts.lines import device, gpu, timed, wrong
from gpu_parts.models import make_sampler, path_of, paths, prompts_of, random_model
from sampling import draws
from training.models import cast
from training.scorer import Scorer

DTYPES = ((torch.float32, 2e-4), (torch.bfloat16, 0.06))  # and how far log-probs may be off
SAME = {torch.float32: 0.95, torch.bfloat16: 0.4}  # of all tokens, those before rows part
SPREAD = 0.04  # of weights: attention and logits that are far from uniform


def correct(part):
    model = random_model(part, "0.5B", torch.float32, layers=4, vocabulary=32000, spread=SPREAD)
    rows = [prompt[: 40 + 13 * i] for i, prompt in enumerate(prompts_of(6, 105))]
    for dtype, tolerance in DTYPES:
        cast(model, dtype)
        for check in (against_model, paths_agree, scorer_agrees):
            part.measure(f"{check.__name__} {dtype}", check, model, rows, tolerance)
    cast(model, torch.float32)
    part.measure("draws", draws_are_fair, 50 if part.small else 32000)
    part.measure("gradient", gradient, part, rows)
    for dtype, _ in DTYPES:
        part.measure(f"twice {dtype}", twice, cast(model, dtype), rows)


@torch.no_grad()
def against_model(model, rows, tolerance) -> dict:
    """Log-probs of two turns of sampling beside a plain forward pass of transformers."""
    sampler = make_sampler(model)
    one = sampler.generate(rows, 4, max_new_tokens=24)
    two = sampler.extend(one, [[7, 8, 9]] * len(one.lengths), 2, max_new_tokens=20)
    worst = 0.0
    for row in range(0, len(two.lengths), 5):
        length = two.lengths[row]
        ids, mask = two.ids[row, :length], two.action_mask[row, 1:length]
        hidden = model.get_decoder()(input_ids=ids[None]).last_hidden_state[0, :-1]
        logits = hidden.float() @ model.get_output_embeddings().weight.float().T
        expected = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        difference = (expected - two.logprobs[row, 1:length])[mask]
        worst = max(worst, float(difference.abs().max()))
    found = {"worst": worst, "tolerance": tolerance, **path_of(sampler)}
    fast = not gpu() or all(path_of(sampler).values())
    return found | wrong(log_probs=worst < tolerance, path_is_not_the_fast_one=fast)


def paths_agree(model, rows, tolerance) -> dict:
    """Each path beside the plain one, on rows of 17 lengths: many sizes of batch, two widths."""
    made, found, fine = paths(model), {}, {}
    limits = [5 + 9 * (i % 17) for i in range(8 * len(rows))]
    plain = made.pop("plain").generate(rows, 8, max_new_tokens=limits)
    for name, sampler in made.items():
        share, worst = alike(sampler.generate(rows, 8, max_new_tokens=limits), plain)
        found[name] = {"same_tokens": share, "worst": worst}
        fine[name.replace(" ", "_")] = share >= SAME[model.dtype] and worst < tolerance
    return {"tolerance": tolerance} | found | wrong(**fine)


def alike(one, other) -> tuple[float, float]:
    """(share of sampled tokens up to where rows part, the largest difference of log-probs there)"""
    mask = one.action_mask
    same = ((one.ids == other.ids) | ~mask).long().cumprod(1).bool() & mask
    difference = (one.logprobs - other.logprobs)[same].abs()
    worst = float(difference.max()) if len(difference) else 0.0
    return int(same.sum()) / int(mask.sum()), worst


@torch.no_grad()
def scorer_agrees(model, rows, tolerance) -> dict:
    """What a run logs as ratio_error: the scorer's log-probs beside the sampler's."""
    rollout = make_sampler(model).generate(rows, 8, max_new_tokens=32)
    scores = Scorer(model)(rollout.ids, rollout.action_mask)
    difference = (scores.logprobs - rollout.logprobs)[rollout.action_mask].abs()
    found = {"worst": float(difference.max()), "mean": float(difference.mean())}
    small = found["worst"] < tolerance and found["mean"] < tolerance / 10
    return found | {"tolerance": tolerance} | wrong(log_probs=small)


def draws_are_fair(words: int, count: int = 20000) -> dict:
    """Uniforms as on a CPU, bit for bit; and how often the 20 likeliest words are drawn."""
    seeds, places = torch.arange(4096) * 7919, torch.arange(4096) % 333
    here = draws.uniform(seeds.to(device()), places.to(device()))
    bits = torch.equal(draws.uniform(seeds, places), here.cpu())
    logits = torch.randn(1, words, generator=torch.Generator().manual_seed(0)).to(device())
    u = draws.uniform(torch.arange(count), torch.zeros(count, dtype=torch.int64)).to(device())
    pieces = [draws.sample(logits.expand(len(some), -1), 1.0, some)[0] for some in u.split(2000)]
    p = logits[0].double().softmax(-1)
    top = p.topk(20).indices
    shares = (torch.cat(pieces)[:, None] == top).double().mean(0)
    z = float(((shares - p[top]) / (p[top] * (1 - p[top]) / count).sqrt()).abs().max())
    return {"largest_z_of_20": z} | wrong(uniforms_as_on_a_CPU=bits, shares=z < 5)


def gradient(part, rows) -> dict:
    """Through the prefix tree in float32, here, beside the same in float64 on the CPU."""
    model = random_model(part, "0.5B", torch.float32, layers=2, vocabulary=2000, spread=SPREAD)
    rollout, found = make_sampler(model).generate(rows, 4, max_new_tokens=12), []
    weights = torch.randn(rollout.ids.shape, generator=torch.Generator().manual_seed(3))
    for where, dtype in ((device(), torch.float32), ("cpu", torch.float64)):
        twin = AutoModelForCausalLM.from_config(model.config, dtype=dtype).to(where)
        twin.load_state_dict(model.state_dict())
        scores = Scorer(twin)(rollout.ids.to(where), rollout.action_mask.to(where))
        (scores.logprobs * weights.to(where)).sum().backward()
        found.append(torch.cat([p.grad.flatten().double().cpu() for p in twin.parameters()]))
    difference = float((found[0] - found[1]).norm() / found[1].norm())
    return {"relative": difference, "tolerance": 1e-3} | wrong(gradient=difference < 1e-3)


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
    """ADAPT HERE: decode attention by our kernels beside the plain path: right, and how fast.

    The same tokens and log-probs on random models, from lengths of 1 to 700, in each dtype and
    head size; then the time of each way.
    """
    if not gpu():
        return part.skip("kernels", "they take a GPU")
    for name, layers in (("1.5B", 4), ("0.5B", 4)):  # heads of 128, of 64
        model = random_model(part, name, torch.float32, layers, vocabulary=32000, spread=SPREAD)
        for dtype, tolerance in DTYPES:
            cast(model, dtype)
            samplers = {on: make_sampler(model, kernels=on, graphs=False) for on in (True, False)}
            if not getattr(samplers[True], "kernels", False):
                part.skip(f"{name} {dtype}", "the sampler has no kernels here")
                continue
            part.measure(f"{name} {dtype} agree", kernels_agree, samplers, dtype, tolerance)
            part.measure(f"{name} {dtype} times", kernels_times, samplers)


def kernels_agree(samplers: dict, dtype, tolerance) -> dict:
    lengths = [1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 300, 511, 512, 513, 640, 680]
    prompts = [row[:length] for row, length in zip(prompts_of(len(lengths), 680), lengths)]
    runs = [sampler.generate(prompts, 4, max_new_tokens=20) for sampler in samplers.values()]
    share, worst = alike(*runs)
    found = {"same_tokens": share, "worst": worst, "tolerance": tolerance}
    return found | wrong(tokens=share >= SAME[dtype], log_probs=worst < tolerance)


def kernels_times(samplers: dict) -> dict:
    """ms a step of 64 rows with 448 tokens on average, of 4 layers, not captured."""
    prompts, found = prompts_of(64, 400), {}
    for on, sampler in samplers.items():
        few, many = (partial(sampler.generate, prompts, max_new_tokens=n) for n in (17, 81))
        found["kernels" if on else "plain"] = 1e3 * (timed(many, 3, 1) - timed(few, 3, 1)) / 64
    return found
