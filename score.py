"""SCoRe (arXiv 2409.12917): teaches a language model to correct itself, with its own attempts as the only data.

    python score.py                        # the tiny model, a few minutes on two cores
    torchrun score.py --model DIR --task countdown --max_new_tokens 256

Stage I trains the second attempt while a strong KL holds the first one at the base model; Stage II trains both, with a
bonus on the second attempt for being better than the first. Each step reads like the paper: roll out two attempts,
verify them, turn verdicts into one advantage a token, and take one step on the shared loss.

Notation: P problems a step, G first attempts of each, K second attempts of each of those; B = P * G * K rows.
"""

import copy
import json
import time
from dataclasses import dataclass, field

import torch
from sampler import Sampler
from torch import Tensor
from tqdm import trange

from evaluate import (
    encode_prompts,
    evaluate,
    evaluate_both,
    format_table,
    format_transcripts,
    grade,
    plot_curves,
)
from loss import BASELINES, KL_KINDS, divide_by_std, subtract_baseline
from policy import (
    Scorer,
    accumulate_gradients,
    apply_gradients,
    exit_on_bad_input,
    forget_metrics,
    load_model,
    log_metrics,
    open_run,
    parse_args,
    pick_problems,
    row_seeds,
    save_model,
    save_state,
    set_lr,
)
from tasks import follow_up_ids, get_task


def flag(default, text: str, **more):
    return field(default=default, metadata={"help": text, **more})


@dataclass
class Config:
    model: str = flag("models/tiny", "model directory or hub name")
    task: str = flag("tiny", "tiny or countdown")
    data: str | None = flag(None, "JSONL file of problems; default: the task's own")
    output_dir: str = flag("runs/score", "the run's directory: new, or to be resumed")
    resume: bool = flag(False, "go on with the run in --output_dir")
    seed: int = flag(0, "seed of the problems' order and of every sample")

    stage1_steps: int = flag(60, "steps of Stage I (Eq. 3); 0 leaves it out")
    stage2_steps: int = flag(260, "steps of Stage II (Eq. 4)")
    single_turn: bool = flag(False, "train first attempts alone: the paper's 'w/o multi-turn training'")
    problems: int = flag(16, "P, problems a step")
    group_size: int = flag(4, "G, first attempts a problem")
    second_attempts: int = flag(4, "K, second attempts of each first one; 1 compares across the problem's G instead")
    max_new_tokens: int = flag(16, "token limit of an attempt")
    temperature: float = flag(1.0, "sampling temperature while training")

    alpha: float = flag(10.0, "weight of the bonus alpha * (r2 - r1) on the second attempt in Stage II; 0: no bonus")
    gamma: float = flag(0.0, "share of the second attempt's reward credited to the first; the paper uses 0")
    beta1: float = flag(0.05, "KL weight of every attempt, but of the first in Stage I (the paper: 0.01)")
    beta2: float = flag(1.0, "KL weight of the first attempt in Stage I (the paper: 0.1 and 0.25)")
    kl_target: float | None = flag(None, "adapt beta2 to keep the first attempt's KL in Stage I near this many nats")
    kl: str = flag("exact", "KL estimator; loss.kl_terms says which gradient each one has", choices=KL_KINDS)
    reference: str = flag(
        "base", "what Stage II's KL refers to: base, or stage1, its result", choices=("base", "stage1")
    )
    baseline: str = flag(
        "leave_one_out",
        "none or leave_one_out (both unbiased), or group_mean. A baseline over the second attempts of one first "
        "attempt removes -alpha * r1, which is constant there: the bonus becomes a weight of 1 + alpha on turn 2",
        choices=BASELINES,
    )
    normalise: str = flag(
        "joint",
        "divide advantages by their standard deviation: none; joint, one for both turns, keeps the turns' ratio, but "
        "not the scale against the KL; per_turn cancels alpha altogether",
        choices=("none", "joint", "per_turn"),
    )
    offline_ratio: float = flag(0.0, "share of steps in which the base model writes the first attempts")

    lr: float = flag(1.5e-4, "peak learning rate of AdamW")
    warmup: int = flag(10, "steps of linear warm-up")
    schedule: str = flag("constant", "after the warm-up", choices=("constant", "cosine"))
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm")
    epochs: int = flag(1, "updates a batch; above 1 the ratio pi / pi_old is clipped")
    clip: float = flag(0.2, "how far the ratio may move from 1 when epochs > 1")
    token_budget: int = flag(16384, "tokens of a micro-batch")

    save_every: int = flag(20, "steps between saved states; the best checkpoint is chosen over such windows")
    eval_every: int = flag(40, "steps between evaluations at T = 1 on validation; 0: only at the end")
    eval_problems: int = flag(300, "validation problems of those evaluations")
    final_problems: int | None = flag(None, "validation problems of the final table; default: all")


def roll_out(sampler, base_sampler, tokenizer, task, problems, prompts, step, config):
    """Two attempts at each problem: (rollout of B rows, r1 (P, G), r2 (P, G, K)); single-turn: r2 is None.

    The second attempt is conditioned on the very ids of the first. Offline, the base model writes the first
    attempts, which are then part of the prompt: they are not sampled from the policy and get no gradient.
    """
    P, G, K = config.problems, config.group_size, config.second_attempts
    limits = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature}
    offline = int((step + 1) * config.offline_ratio) > int(step * config.offline_ratio)
    seeds = row_seeds(config.seed, step, P * G)
    first = (base_sampler if offline else sampler).generate(prompts, G, seeds=seeds, **limits)
    rows = [problem for problem in problems for _ in range(G)]
    r1 = grade(tokenizer, task, first, 0, rows)[1].view(P, G)
    if config.single_turn:
        return first, r1, None
    instruction = follow_up_ids(tokenizer, task.correct, first.stopped[:, 0].tolist())
    if offline:
        spoken = [ids[:n] for ids, n in zip(first.ids.tolist(), first.lengths.tolist(), strict=True)]
        instruction = [a + b for a, b in zip(spoken, instruction, strict=True)]
        second = sampler.generate(instruction, K, seeds=row_seeds(config.seed + 1, step, P * G * K), **limits)
        second.turn.clamp_(max=0).add_(second.turn >= 0)
    else:
        second = sampler.extend(first, instruction, K, **limits)
    rows = [problem for problem in rows for _ in range(K)]
    r2 = grade(tokenizer, task, second, 0 if offline else 1, rows)[1].view(P, G, K)
    return second, r1, r2


def returns(r1: Tensor, r2: Tensor | None, stage: int, config) -> tuple[Tensor, Tensor | None]:
    """What each attempt is rewarded for: (P, G) and (P, G, K).

    Stage I, Eq. 3:  the second attempt gets r2, the first nothing.
    Stage II, Eq. 4: the first gets r1, the second r2 plus the bonus alpha * (r2 - r1).
    gamma > 0 also credits the first attempt with what the second gets (appendix A.2 argues for 0).
    """
    if r2 is None:
        return r1, None
    if stage == 1:
        first, second = torch.zeros_like(r1), r2
    else:
        first, second = r1, r2 + config.alpha * (r2 - r1[..., None])
    return first + config.gamma * second.mean(-1), second


def turn_advantages(r1: Tensor, r2: Tensor | None, stage: int, config) -> Tensor:
    """The advantage of every token of each turn: (B, turns)."""
    first, second = returns(r1, r2, stage, config)
    first = subtract_baseline(first, config.baseline)
    if second is None:
        advantages = first.reshape(-1, 1)
    else:
        P, G, K = second.shape
        second = subtract_baseline(second.view(P * G, K) if K > 1 else second.view(P, G), config.baseline)
        first = first[..., None].expand(P, G, K)
        advantages = torch.stack([first.reshape(-1), second.reshape(-1)], dim=1)
    if config.normalise == "none":
        return advantages
    return divide_by_std(advantages, dim=0 if config.normalise == "per_turn" else None)


def turn_kl_coefs(stage: int, beta2: float, config) -> list[float]:
    """Stage I holds the first attempt with beta2 (Eq. 3); everything else has the ordinary beta1 (Eq. 2, 4)."""
    return [beta2 if stage == 1 else config.beta1, config.beta1]


def spread(per_turn: Tensor, rollout) -> Tensor:
    """(B, turns) -> (B, T): every sampled token gets its turn's value, every other token 0."""
    return per_turn.gather(1, rollout.turn.clamp_min(0)) * rollout.action_mask


def update(scorer, optimizer, rollout, advantages: Tensor, kl_coef: Tensor, config):
    """One step (or `epochs`) on the shared loss; (scores before it, gradient norm). Means are over the B rows."""
    before = None
    for _ in range(config.epochs):
        scores = accumulate_gradients(
            scorer, rollout, advantages, kl_coef, len(rollout.ids), config.temperature, config.kl,
            config.token_budget, None if before is None else before.logprobs, config.clip,
        )  # fmt: skip
        before = before or scores
        norm = apply_gradients(scorer.model, optimizer, config.max_grad_norm)
    return before, norm


def step_metrics(rollout, r1, r2, scores, advantages) -> dict:
    """A step's figures. acc_* are verdicts, never shaped rewards; kl_* are nats an attempt; the rest a sampled token.

    ratio_error: the largest |log pi - log pi_sampler|: 0 up to rounding while sampler and scorer agree.
    zero_advantage: share of sampled tokens that get no policy gradient. truncated: attempts cut off by the limit.
    """
    sampled = rollout.action_mask
    row = {"reward": float(r1.mean()), "acc_t1": float(r1.mean())}
    if r2 is not None:
        row |= {"acc_t2": float(r2.mean()), "delta": float(r2.mean() - r1.mean())}
        row["reward"] = float(r1.mean() + r2.mean())
    for turn in range(rollout.stopped.shape[1]):
        row[f"kl_t{turn + 1}"] = float((scores.kl * (rollout.turn == turn)).sum() / len(rollout.ids))
    row["entropy"] = float(scores.entropy[sampled].mean())
    row["ratio_error"] = float((scores.logprobs - rollout.logprobs)[sampled].abs().max())
    row["zero_advantage"] = float((advantages[sampled] == 0).float().mean())
    row["truncated"] = 1 - float(rollout.stopped.float().mean())
    row["tokens"] = int(sampled.sum())
    return row


def adapt_beta2(beta2: float, kl: float, config) -> float:
    """Half as strong again when the first attempt strays beyond 1.5 targets, weaker when it stays below 1 / 1.5."""
    if config.kl_target is None:
        return beta2
    return beta2 * (1.5 if kl > 1.5 * config.kl_target else 1 / 1.5 if kl < config.kl_target / 1.5 else 1.0)


def prepare(config):
    """Everything that can be wrong with the user's input is found here, before anything is written."""
    task = get_task(config.task)
    if config.baseline == "leave_one_out" and config.group_size < 2:
        raise ValueError("--group_size 1 has nothing to leave out: use --baseline none, or groups of at least 2")
    if config.temperature <= 0:
        raise ValueError("--temperature must be above 0 in training: greedy attempts have no policy gradient")
    model, tokenizer = load_model(config.model)
    splits = {}
    for split, limit in (("train", None), ("validation", config.final_problems)):
        problems = task.problems(split, config.data, config.seed)[:limit]
        prompts = encode_prompts(model, tokenizer, task, problems, config.max_new_tokens)
        splits[split] = list(zip(problems, prompts, strict=True))
    return task, model, tokenizer, splits, open_run(config)


def train(config, task, model, tokenizer, splits, run) -> None:
    """Stage I, then Stage II; leaves the best model in run/checkpoint and a line a step in run/metrics.jsonl."""
    scorer = Scorer(model, copy.deepcopy(model))
    sampler, base_sampler = Sampler(model, tokenizer), Sampler(copy.deepcopy(model), tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    total = config.stage1_steps + config.stage2_steps
    start, beta2, best, window = 0, config.beta2, float("-inf"), []
    if config.resume:
        state = torch.load(run / "state.pt")
        start, beta2, best, window = (state[k] for k in ("step", "beta2", "best", "window"))
        model.load_state_dict(state["model"])
        scorer.reference.load_state_dict(state["reference"])
        optimizer.load_state_dict(state["optimizer"])
        forget_metrics(run, start)

    progress = trange(start, total, initial=start, total=total, desc="SCoRe")
    for step in progress:
        stage = 1 if step < config.stage1_steps else 2
        if step == config.stage1_steps and config.reference == "stage1":
            scorer.reference.load_state_dict(model.state_dict())
        set_lr(optimizer, config.lr, step, total, config.warmup, config.schedule)
        problems, prompts = zip(*pick_problems(splits["train"], config.seed, step, config.problems), strict=True)

        clock = time.perf_counter()
        rollout, r1, r2 = roll_out(sampler, base_sampler, tokenizer, task, problems, prompts, step, config)
        rollout.cache = None
        sampled_at = time.perf_counter()
        per_turn = turn_advantages(r1, r2, stage, config).to(rollout.ids.device)
        advantages = spread(per_turn, rollout)
        coefs = torch.tensor(turn_kl_coefs(stage, beta2, config)).to(advantages)
        kl_coef = spread(coefs.expand(len(rollout.ids), 2), rollout)
        scores, norm = update(scorer, optimizer, rollout, advantages, kl_coef, config)

        row = {"stage": stage, "step": step} | step_metrics(rollout, r1, r2, scores, advantages)
        row |= {"beta2": beta2, "grad_norm": norm, "lr": optimizer.param_groups[0]["lr"]}
        row |= {"seconds_rollout": sampled_at - clock, "seconds_update": time.perf_counter() - sampled_at}
        if stage == 1:
            beta2 = adapt_beta2(beta2, row["kl_t1"], config)
        if config.eval_every and (step + 1) % config.eval_every == 0:
            row |= evaluate_now(sampler, tokenizer, task, splits["validation"], run, step, config)
        log_metrics(run, row)
        shown = {k: f"{row[k]:.3f}" for k in ("reward", "acc_t1", "acc_t2", "kl_t1") if k in row}
        progress.set_postfix(stage=stage, **shown)

        window.append(row["reward"])
        if (step + 1) % config.save_every == 0 or step + 1 == total:
            if stage == 2 and sum(window) / len(window) > best:
                best = sum(window) / len(window)
                save_model(model, tokenizer, run / "checkpoint")
            window = []
            save_state(
                run, step=step + 1, beta2=beta2, best=best, window=window, model=model.state_dict(),
                reference=scorer.reference.state_dict(), optimizer=optimizer.state_dict(),
            )  # fmt: skip


def evaluate_now(sampler, tokenizer, task, split, run, step, config) -> dict:
    """Figures at T = 1 on a part of validation, as `eval_*`; a few conversations go to run/transcripts.txt."""
    problems, prompts = zip(*split[: config.eval_problems], strict=True)
    figures, talks = evaluate(sampler, tokenizer, task, problems, prompts, config.max_new_tokens, 1.0, seed=config.seed)
    with open(run / "transcripts.txt", "a") as file:
        file.write(f"step {step + 1}\n{format_transcripts(talks)}\n\n")
    return {f"eval_{key}": figures[key] for key in ("acc_t1", "acc_t2", "delta", "i_to_c", "c_to_i", "well_formed")}


def main(config: Config) -> None:
    with exit_on_bad_input():
        task, model, tokenizer, splits, run = prepare(config)
    problems, prompts = zip(*splits["validation"], strict=True)
    shared = (tokenizer, task, problems, prompts, config.max_new_tokens)
    results = {"base": evaluate_both(Sampler(model, tokenizer), *shared)}
    train(config, task, model, tokenizer, splits, run)
    best, _ = load_model(str(run / "checkpoint"))
    results["trained"] = evaluate_both(Sampler(best, tokenizer), *shared)
    (run / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    plot_curves(run)
    print(f"\n{len(problems)} validation problems:\n\n{format_table(results)}\n\nrun: {run}")


if __name__ == "__main__":
    main(parse_args(Config))
