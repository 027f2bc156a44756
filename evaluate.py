"""Evaluation of several attempts: `python evaluate.py --model DIR --task NAME --method METHOD
--output FILE.json`.

The model answers, then answers again; --method says what comes between. All figures are the
verifier's verdicts, never a shaped reward; figures.py says what each one is. As a library: what the
training scripts share (`prepare`, `probe`, `grade`, `evaluate`, ...).
"""

import json
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from methods import AFTER_ANY, METHODS, next_attempts
from report.figures import (
    COLUMNS,
    format_reflections,
    format_table,
    format_transcripts,
    format_votes,
    summarize,
    values_of,
    votes,
)
from sampler import Sampler
from sampling.rollout import Rollout, rollout_of
from sampling.turns import encode, first_turn_ids, seam_ids
from tasks.base import Task, load_task
from tasks.sources import SPLITS
from training import distributed
from training.distributed import exchange, on_first, rank, share, world
from training.flags import TaskConfig, check_counts, exit_on_bad_input, flag, parse_args
from training.policy import compute_dtype, fingerprint, load_model, pick_problems, row_seeds
from verifiers import verify_batch

CACHE_TOKENS = 2**16  # of the conversations that are held in memory together


@dataclass
class Config(TaskConfig):
    split: str = flag("validation", "train, validation or test (for final tables only)")
    limit: int | None = flag(None, "only the first so many problems")
    temperature: float = flag(0.0, "0 is greedy")
    samples: int = flag(1, "conversations a problem, at a temperature above 0")
    method: str = flag(
        "self_correct", "; ".join(f"{k}: {v}" for k, v in METHODS.items()), choices=tuple(METHODS)
    )
    attempts: int = flag(2, "attempts a conversation, the first included")
    reflector: str | None = flag(None, "model that writes the reflections; default: --model")
    max_new_tokens: int = flag(16, "token limit of an attempt")
    max_reflection_tokens: int = flag(72, "token limit of a reflection or critique")
    seed: int = flag(0, "seed of the sampling")
    output: str | None = flag(
        None,
        "new JSON file for the figures and conversations; an evaluation that was stopped goes on where it was",
    )


def prepare(config, limits: dict[str, int | None]):
    """(task, sampler, tokenizer, {split: [(problem, prompt_ids)]}) for a script; any bad input is a
    ValueError here.

    `limits` names the splits and how many problems of each to take (None: all).
    """
    task, problems = load_task(config, limits)
    splits = {name: problems[name][:limit] for name, limit in limits.items()}
    model, tokenizer = load_model(config.model, dtype=compute_dtype(config))
    sampler = Sampler(model, tokenizer)
    for name, problems in splits.items():
        prompts = encode_prompts(sampler, tokenizer, task, problems, config)
        splits[name] = list(zip(problems, prompts, strict=True))
    return task, sampler, tokenizer, splits


def load_sampler(name: str, tokenizer, config) -> Sampler:
    return Sampler(load_model(name, dtype=compute_dtype(config))[0], tokenizer)


def before_and_after(run: Path, config) -> dict[str, str]:
    """The models that a run's final table is about, to be loaded one by one where one is enough."""
    return {"base": config.model, "trained": str(run / "checkpoint")}


def encode_prompts(sampler, tokenizer, task: Task, problems: list[dict], config) -> list[list[int]]:
    """First prompts as ids. A conversation that might not fit the model's context is a
    ValueError."""
    stop = seam_ids(tokenizer, task.correct)[0]
    if not sampler.is_stop[stop]:
        end = tokenizer.decode([stop])
        raise ValueError(
            f"the chat template ends a turn with {end!r}, where the model does not stop: add it to its eos"
        )
    follows = follow_tokens(tokenizer, task, config)
    prompts = [first_turn_ids(tokenizer, task.prompt(problem), task.shots) for problem in problems]
    spoken = [
        len(prompt) + len(given_ids(tokenizer, task, p))
        for prompt, p in zip(prompts, problems, strict=True)
    ]
    longest = max(range(len(prompts)), key=lambda i: spoken[i])
    if spoken[longest] + follows > sampler.limit:
        raise ValueError(
            f"problem {longest}: a prompt of {spoken[longest]} tokens and up to {follows} after it don't fit "
            f"the model's context of {sampler.limit}: lower --shots or the token limits, or leave it out"
        )
    return prompts


def follow_tokens(tokenizer, task: Task, config) -> int:
    """How many tokens may come after a first prompt, at most."""
    correct, reflect, retry, critique, rewrite = (
        len(seam_ids(tokenizer, message))
        for message in (task.correct, task.reflect, task.retry, task.critique, task.rewrite)
    )
    between = max(correct, retry)
    if config.max_reflection_tokens:
        between = max(correct, reflect + retry, critique + rewrite) + config.max_reflection_tokens
    return config.max_new_tokens + (config.attempts - 1) * (between + config.max_new_tokens)


def given_ids(tokenizer, task: Task, problem: dict) -> list[int]:
    """The first attempt that the data gives, with the token that ends a turn; empty where the model
    makes its own."""
    if task.given is None:
        return []
    return encode(tokenizer, task.given(problem)) + seam_ids(tokenizer, task.correct)[:1]


def first_attempts(
    sampler, tokenizer, task: Task, problems, prompts, group_size, seeds, limits
) -> Rollout:
    """`group_size` attempts at each problem: sampled, or given by the data; then there is no cache
    to go on from."""
    if task.given is None:
        return sampler.generate(prompts, group_size, seeds=seeds, **limits)
    given = [given_ids(tokenizer, task, problem) for problem in problems]
    rows = [
        [prompt, answer]
        for prompt, answer in zip(prompts, given, strict=True)
        for _ in range(group_size)
    ]
    return rollout_of(
        rows, 1, torch.arange(len(prompts)).repeat_interleave(group_size), seeds, sampler
    )


def probe(
    sampler, tokenizer, task: Task, split, config, method: str, keys=("acc_t1", "acc_t2")
) -> None:
    """ValueError if --probe problems at the training temperature are all right or all wrong: no
    signal to learn from.

    split: (problem, prompt ids) to train on. keys: the figures of the METHOD that training would
        reward.
    """
    if not config.probe:
        return
    chosen = pick_problems(split, config.seed, 0, min(config.probe, len(split)))
    problems, prompts = zip(*chosen, strict=True)
    figures, _ = evaluate(
        sampler, tokenizer, task, problems, prompts, config, config.temperature, method
    )
    rates = {key: figures.get(key, 1.0) for key in keys}  # no failure: there is nothing to retry
    if {*rates.values()} in ({0.0}, {1.0}):
        shown = ", ".join(f"{key} {rate:.0%}" for key, rate in rates.items())
        wrong = 0.0 in rates.values()
        raise ValueError(
            f"no signal: of {len(chosen)} training problems at T = {config.temperature:g}, {shown} "
            f"({figures['truncated']:.0%} of answers cut off). Try "
            + (
                "--shots 3, easier data, more --max_new_tokens or a bigger model"
                if wrong
                else "harder data"
            )
            + "; or train all the same with --probe 0"
        )


def grade(
    tokenizer, task: Task, rollout, turn: int, problems: list[dict]
) -> tuple[list[str], torch.Tensor]:
    """The text of every row's answer in `turn` and the verdict on it: (B,) strings, (B,) float32 of
    0 and 1."""
    answers = rollout.completion_ids(turn)
    texts = tokenizer.batch_decode(answers) if answers else []  # it takes [] for a single text
    workers = 2 * (os.cpu_count() or 1) if task.warm_up else 1
    verdicts = verify_batch(task.verify, texts, problems, workers)
    return texts, torch.tensor(verdicts, dtype=torch.float32)


def converse(
    cast, tokenizer, task: Task, asked, prompts, seeds, config, temperature, method, samples
) -> list[dict]:
    """The conversations of `samples` rows a problem, as figures.py wants them. Rows that have ended
    leave."""
    limits = {"max_new_tokens": config.max_new_tokens, "temperature": temperature}
    rollout = first_attempts(cast[0], tokenizer, task, asked, prompts, samples, seeds, limits)
    problems = [problem for problem in asked for _ in range(samples)]
    # rows: which conversation a row of the rollout belongs to
    maker, rows = cast[0], list(range(len(problems)))
    attempts = [[answer] for answer in answers_of(tokenizer, task, rollout, problems)]
    said = [[] for _ in rows]
    for _ in range(config.attempts - 1):
        chosen = [
            i for i, row in enumerate(rows) if method in AFTER_ANY or not attempts[row][-1]["right"]
        ]
        if not chosen:
            break
        shared = (cast, maker, tokenizer, task, limits, config.max_reflection_tokens)
        rollout, between = next_attempts(method, rollout, chosen, *shared)
        maker, rows = cast[2], [rows[i] for i in chosen]
        answers = answers_of(tokenizer, task, rollout, [problems[row] for row in rows])
        for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            attempts[row].append(answer)
            said[row] += [between[i]] if between else []
    return [
        {
            "problem": problem,
            "attempts": [{key: y[key] for key in ("text", "answer", "right")} for y in ys],
            "said": [tokenizer.decode(i) for i in ids],
            "values": values_of(ys, ids, config.attempts),
        }
        for problem, ys, ids in zip(problems, attempts, said, strict=True)
    ]


def evaluate(
    cast, tokenizer, task: Task, problems, prompts, config, temperature, method="self_correct", samples=1, seed=0,
    done=(), keep=None,
) -> tuple[dict, list[dict]]:  # fmt: skip
    """(figures, conversations) of some attempts at every problem, by one of METHODS.

    cast: one sampler, or the three that attempt, reflect and retry. config: max_new_tokens,
        max_reflection_tokens,
    attempts. done: conversations there already. keep: called with every piece of new ones. Ranks
    share the problems of each piece, and all get all conversations.
    """
    cast = cast if isinstance(cast, tuple) else (cast, cast, cast)
    seeds = row_seeds(len(problems) * samples, "evaluate", seed)
    talks = list(done)
    longest = max(map(len, prompts)) + follow_tokens(tokenizer, task, config)
    piece = max(1, CACHE_TOKENS // longest // samples) * world()  # problems
    starts = range(len(talks) // samples, len(problems), piece)
    for start in tqdm(starts, desc=method, leave=False, disable=len(starts) < 2 or rank() > 0):
        mine = share(min(piece, len(problems) - start))
        some = slice(start + mine.start, start + mine.stop)
        own = seeds[some.start * samples : some.stop * samples]
        shared = (problems[some], prompts[some], own, config, temperature, method, samples)
        new = [
            talk
            for part in exchange(converse(cast, tokenizer, task, *shared) if mine else [])
            for talk in part
        ]
        if keep:
            keep(new)
        talks += new
    figures = summarize(talks, samples)
    return figures | (votes(talks, samples) if samples > 1 else {}), talks


def answers_of(tokenizer, task: Task, rollout, problems: list[dict]) -> list[dict]:
    """What is to be known of each row's answer in the last turn."""
    turn = rollout.stopped.shape[1] - 1
    texts, verdicts = grade(tokenizer, task, rollout, turn, problems)
    columns = (
        texts,
        verdicts.tolist(),
        rollout.completion_ids(turn),
        rollout.stopped[:, turn].tolist(),
        problems,
    )
    return [
        {
            "text": text,
            "right": right,
            "ids": ids,
            "stopped": stopped,
            "answer": task.answer(text, problem),
        }
        for text, right, ids, stopped, problem in zip(*columns, strict=True)
    ]


def evaluate_both(*arguments, method: str = "self_correct") -> dict:
    """Figures under `greedy` and `sampled` (T = 1); arguments as of `evaluate`."""
    modes = {"greedy": 0.0, "sampled": 1.0}
    return {name: evaluate(*arguments, T, method)[0] for name, T in modes.items()}


def controls(base, trained) -> dict[str, tuple]:
    """{name: (cast, method)}, all after the base model's failures: who reflects, who retries, and
    what if nobody reflects."""
    casts = {"base": (base, base, base), "trained": (base, trained, trained)}
    named = {
        f"{name}, {m}": (cast, m)
        for name, cast in casts.items()
        for m in METHODS
        if m not in AFTER_ANY
    }
    named["trained reflects, base retries"] = ((base, trained, base), "reflect_retry")
    named["base reflects, trained retries"] = ((base, base, trained), "reflect_retry")
    return named


def compare_after_failure(base, trained, *shared) -> dict:
    """Figures of the `controls`."""
    named = controls(base, trained).items()
    return {name: evaluate_both(cast, *shared, method=method) for name, (cast, method) in named}


def side_by_side(base, trained, *shared) -> str:
    """Reflections on the same failures before and after training, at T = 1."""
    casts = {"before": (base, base, base), "after": (base, trained, trained)}
    talks = {name: evaluate(cast, *shared, 1.0, "reflect_retry")[1] for name, cast in casts.items()}
    return format_reflections(talks["before"], talks["after"])


def open_output(config: Config, sampler) -> list[dict]:
    """The conversations that an earlier call left behind in the file beside --output, which is made
    ready for more.

    One that was left by other flags or another model is a ValueError.
    """
    path = Path(f"{config.output}.partial")
    header = asdict(config) | {"fingerprint": fingerprint(sampler.model)}
    done = []
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        # the last may be cut off
        before, *rows = [json.loads(line) for line in lines if line.endswith("\n")]
        changed = [key for key in header if before.get(key) != header[key]]
        if changed:
            raise ValueError(
                f"{path} was left by an evaluation with another {', '.join(changed)}: delete or finish it"
            )
        done = rows[: len(rows) - len(rows) % config.samples]
    keep(config, [header, *done], "w")
    return done


def keep(config: Config, talks: list[dict], mode: str = "a") -> None:
    if config.output and rank() == 0:
        with open(f"{config.output}.partial", mode) as file:
            file.write("".join(json.dumps(talk) + "\n" for talk in talks))


def check(config: Config) -> None:
    if config.split not in SPLITS:
        raise ValueError(f"--split {config.split}: choose one of {', '.join(SPLITS)}")
    if config.temperature < 0:
        raise ValueError(f"--temperature {config.temperature:g}: must be 0 (greedy) or above")
    if config.samples > 1 and not config.temperature:
        raise ValueError(
            f"--samples {config.samples} would all be the same: give a --temperature above 0"
        )
    if config.output and (Path(config.output).exists() or not Path(config.output).parent.is_dir()):
        raise ValueError(
            f"--output {config.output}: it exists, or its directory does not; name a new file"
        )
    check_counts(config)


def main(config: Config) -> None:
    distributed.start()
    with exit_on_bad_input():
        check(config)
        task, sampler, tokenizer, splits = prepare(config, {config.split: config.limit})
        reflector = sampler
        if config.reflector:
            reflector = load_sampler(config.reflector, tokenizer, config)
        done = on_first(open_output, config, sampler) if config.output else []
    columns = zip(*splits[config.split], strict=True)
    arguments = (config, config.temperature, config.method, config.samples, config.seed)
    figures, talks = evaluate(
        (sampler, reflector, sampler),
        tokenizer,
        task,
        *columns,
        *arguments,
        done=done,
        keep=partial(keep, config),
    )
    print(format_transcripts(talks))
    print(f"{figures['n']} {config.split} problems\n")
    names = tuple(f"acc_t{t}" for t in range(3, config.attempts + 1))
    names += () if config.method in AFTER_ANY else ("retry_given_failure", "well_formed_retry")
    print(
        format_table(
            {config.model: {"sampled" if config.temperature else "greedy": figures}},
            COLUMNS + names,
        )
    )
    if config.samples > 1:
        print(f"\nMajority votes:\n\n{format_votes(figures)}")
    if config.output and rank() == 0:
        Path(config.output).write_text(
            json.dumps(figures | {"conversations": talks}, indent=1) + "\n"
        )
        Path(config.output + ".partial").unlink()
    distributed.finish()


if __name__ == "__main__":
    main(parse_args(Config))
