"""What `reproduce.py` measures of one model, in a process of its own: figures of the test split.

Written as JSON. Each attempt of each of the 1,500 problems is kept as a bit, so that methods can be
compared problem by problem.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import rrr  # noqa: E402
import score  # noqa: E402
from evaluate import MODES, Exam, Protocol, evaluate  # noqa: E402
from report.figures import votes  # noqa: E402
from training.batches import pick  # noqa: E402
from training.checkpoint import write_text  # noqa: E402
from training.controls import controls  # noqa: E402
from training.flags import flag, parse_args  # noqa: E402
from training.models import make_scorer  # noqa: E402
from training.policy import accumulate_gradients  # noqa: E402
from training.setup import load_sampler, prepare  # noqa: E402

ATTEMPTS, VOTERS, VOTED = 10, 32, 500  # in a row; answers a problem, and of how many problems
EDIT_BINS = np.linspace(0, 0.5, 26)
DESIGNS = {  # of a batch, all of 320 attempts: P, G, K
    "nested, K = 4": (16, 4, 4),
    "flat, K = 1": (16, 10, 1),
    "flat, K = 1, more problems": (40, 4, 1),
}


@dataclass
class Config:
    model: str = flag("models/tiny", "the model to measure")
    base: str = flag("models/tiny", "the one that it was trained from")
    method: str = flag("self_correct", "self_correct or self_refine; reflect_retry: with controls")
    more: bool = flag(False, "also edit distances, many attempts, and votes")
    noise: bool = flag(False, "only the noise of SCoRe's gradient at this model")
    limit: int | None = flag(None, "only the first so many test problems")
    batches: int = flag(24, "batches of --noise")
    output: str = flag("test.json", "JSON file to write")


def bits(values) -> str:
    """A list of 0 and 1 as its length and hexadecimal digits; tables.unpacked reads it."""
    return f"{len(values)}:{np.packbits(np.array(values, dtype=bool)).tobytes().hex()}"


def measure(exam, cast, problems) -> tuple[dict, dict, dict]:
    """({mode: figures}, {mode: {key: bits}}, {mode: conversations}), two attempts a problem."""
    figures, kept, talks = {}, {}, {}
    for mode, T in MODES.items():
        figures[mode], talks[mode] = exam(cast, problems, T)
        values = [talk["values"] for talk in talks[mode]]
        keys = ("acc_t1", "acc_t2", "well_formed")
        kept[mode] = {key: bits([v[key] == 1 for v in values]) for key in keys}
    return figures, kept, talks


def more_of(sampler, env, talks: list[dict], problems, settings) -> tuple[list, dict]:
    """([kind, x, value], ...) of curves that take longer, T = 1; the bits of the largest vote."""
    ratios = [min(talk["values"]["edit_ratio"], 0.499) for talk in talks]
    counts = np.histogram(ratios, EDIT_BINS)[0] / len(ratios)
    rows = [["edit_ratio", round(float(x), 3), float(n)] for x, n in zip(EDIT_BINS, counts)]
    # ten of 14 tokens fit into the context; a whole attempt has 13
    long = Protocol("self_correct", 1.0, 14, 0, attempts=ATTEMPTS)
    figures, _ = evaluate(sampler, env, problems, long)
    rows += [["attempts", t, figures[f"acc_t{t}"]] for t in range(1, ATTEMPTS + 1)]
    limits = (settings.max_new_tokens, settings.max_reflection_tokens)
    many = Protocol("self_correct", 1.0, *limits, samples=VOTERS)
    figures, talks = evaluate(sampler, env, problems[:VOTED], many)
    for kind in ("parallel", "corrected"):
        budgets = [2**i for i in range(1, 11) if 2**i <= VOTERS]
        rows += [[f"vote_{kind}", budget, figures[f"vote_{kind}_{budget}"]] for budget in budgets]
    each = [votes(talks[i : i + VOTERS], VOTERS) for i in range(0, len(talks), VOTERS)]
    keys = [f"vote_{kind}_{VOTERS}" for kind in ("parallel", "corrected")]
    return rows, {key: bits([v[key] for v in each]) for key in keys}


def measure_all(config: Config) -> dict:
    settings = replace(rrr.Config(), model=config.base)
    few = min(settings.eval_problems, config.limit or settings.eval_problems)
    env, base, splits = prepare(settings, {"test": config.limit, "validation": few})
    test, exam = splits["test"], Exam(env, settings, config.method)
    trained = base
    if config.model != config.base:
        trained = load_sampler(config.model, env, settings)
    figures, kept, talks = measure(exam, trained, test)
    found = {"figures": {"": figures}, "bits": {"": kept}, "more": []}
    if trained is base:  # as a run evaluates it, so that its curves have where to begin
        start, _ = exam(base, splits["validation"], 1.0)
        found["start"] = {f"eval_{key}": value for key, value in start.items()}
    if config.method == "reflect_retry":
        for name, (cast, method) in controls(base, trained).items():
            if name.startswith("base,") == (trained is base):  # the base's: once for all models
                figures, kept, _ = measure(replace(exam, method=method), cast, test)
                found["figures"][name], found["bits"][name] = figures, kept
    if config.more:
        found["more"], votes_kept = more_of(trained, env, talks["sampled"], test, settings)
        found["bits"][""]["sampled"] |= votes_kept
    return found


def gradient(scorer, sampler, env, mine, config) -> torch.Tensor:
    """Of one batch of Stage II, as a vector."""
    attempts = score.roll_out(env, sampler, mine, config)
    accumulate_gradients(scorer, score.make_batch(attempts, 2, 0.0, config), config)
    parts = [p.grad.flatten() for p in scorer.model.parameters() if p.grad is not None]
    scorer.model.zero_grad(set_to_none=True)
    return torch.cat(parts)


def noise_of(gradients: torch.Tensor) -> dict:
    """Of n gradients (n, weights): the variance of one, and the squared length of their mean.

    The latter without the part of it that is noise; both with standard errors (jackknife); and how
    many such batches make the noise as long as the mean.
    """
    n = len(gradients)

    def estimate(some: torch.Tensor) -> tuple[float, float]:
        variance = float(some.var(dim=0).sum())
        return variance, float(some.mean(dim=0).square().sum()) - variance / len(some)

    variance, signal = estimate(gradients)
    without = np.array([estimate(gradients[torch.arange(n) != i]) for i in range(n)])
    errors = ((n - 1) * without.var(axis=0)) ** 0.5
    found = {"variance": variance, "variance_se": errors[0]}
    found |= {"signal": signal, "signal_se": errors[1]}
    return found | {"batches": variance / signal if signal > 0 else float("nan")}


def measure_noise(config: Config) -> list[dict]:
    """Nested against flat second attempts, with and without the bonus.

    The expected gradient is the same for both shapes.
    """
    rows = []
    for alpha in (0.0, 10.0):
        for name, (P, G, K) in DESIGNS.items():
            sizes = {"problems": P, "group_size": G, "second_attempts": K}
            sizes |= {"alpha": alpha, "beta1": 0.0, "normalise": "none", "seed": 1000}
            settings = score.Config(model=config.model, **sizes)
            env, sampler, splits = prepare(settings, {"train": None})
            scorer = make_scorer(sampler.model, settings)
            batches = [pick(splits["train"], P, 1000, step) for step in range(config.batches)]
            found = [gradient(scorer, sampler, env, mine, settings) for mine in batches]
            row = {"design": name, "alpha": alpha, "n": config.batches}
            rows.append(row | noise_of(torch.stack(found)))
    return rows


def main(config: Config) -> None:
    found = measure_noise(config) if config.noise else measure_all(config)
    write_text(Path(config.output), json.dumps(found))


if __name__ == "__main__":
    main(parse_args(Config))
