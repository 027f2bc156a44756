"""Evaluation of two attempts: `python evaluate.py --model DIR --task NAME --method METHOD --output FILE.json`.

The model answers, then answers again; --method says what comes between. All figures are the verifier's verdicts, never
a shaped reward. As a library: what the training scripts share (`prepare`, `evaluate`, `report`, ...).

    acc_t1, acc_t2   right at the first, the second attempt      i_to_c   wrong, then right, of all problems
    delta            acc_t2 - acc_t1 = i_to_c - c_to_i           c_to_i   right, then wrong, of all problems
    changed          the two answers differ                      edit_ratio   edit distance / (len(y1) + len(y2))
    well_formed      attempts with an answer that can be graded  truncated    attempts cut off by the token limit
    tokens           sampled for a problem, all told             retry_given_failure   i_to_c, of the wrong ones
    reflection_tokens  of a reflection, without its stop token      well_formed_retry    well_formed, of retries

Where a method retries only what was wrong, a right first answer stands as the second.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from chat import encode, first_turn_ids, follow_up_ids, seam_ids
from data import SPLITS
from policy import TaskConfig, check_counts, exit_on_bad_input, flag, load_model, parse_args, pick_problems, row_seeds
from sampler import Rollout, Sampler
from tasks import Task, load_task

METHODS = {
    "self_correct": "asked to correct itself after any answer, right or wrong (SCoRe)",
    "reflect_retry": "after a wrong answer, reflects and tries again (RRR)",
    "blind_retry": "after a wrong answer, is told to try again, with no reflection",
    "generic_reflection": "the same, after a fixed reflection in its own name that knows nothing of the problem",
    "fresh_attempt": "after a wrong answer, a new first attempt from an empty context",
}
COLUMNS = ("acc_t1", "acc_t2", "delta", "i_to_c", "c_to_i", "changed", "edit_ratio", "well_formed")


@dataclass
class Config(TaskConfig):
    split: str = flag("validation", "train, validation or test (for final tables only)")
    limit: int | None = flag(None, "only the first so many problems")
    temperature: float = flag(0.0, "0 is greedy")
    samples: int = flag(1, "conversations a problem, at a temperature above 0")
    method: str = flag("self_correct", "; ".join(f"{k}: {v}" for k, v in METHODS.items()), choices=tuple(METHODS))
    reflector: str | None = flag(None, "model that writes the reflections; default: --model")
    max_new_tokens: int = flag(16, "token limit of an attempt")
    max_reflection_tokens: int = flag(72, "token limit of a reflection")
    seed: int = flag(0, "seed of the sampling")
    output: str | None = flag(None, "JSON file for the figures and conversations")


def prepare(config, limits: dict[str, int | None]):
    """(task, sampler, tokenizer, {split: [(problem, prompt_ids)]}) for a script; any bad input is a ValueError here.

    `limits` names the splits and how many problems of each to take (None: all).
    """
    task, problems = load_task(config, limits)
    splits = {name: problems[name][:limit] for name, limit in limits.items()}
    model, tokenizer = load_model(config.model)
    sampler = Sampler(model, tokenizer)
    for name, problems in splits.items():
        prompts = encode_prompts(sampler, tokenizer, task, problems, config)
        splits[name] = list(zip(problems, prompts, strict=True))
    return task, sampler, tokenizer, splits


def encode_prompts(sampler, tokenizer, task: Task, problems: list[dict], config) -> list[list[int]]:
    """First prompts as ids. A conversation that might not fit the model's context is a ValueError."""
    seam = {message: seam_ids(tokenizer, message) for message in (task.correct, task.reflect, task.retry)}
    stop = seam[task.correct][0]
    if not sampler.is_stop[stop]:
        end = tokenizer.decode([stop])
        raise ValueError(
            f"the chat template ends a turn with {end!r}, where the model does not stop: add it to its eos"
        )
    follows = len(seam[task.correct]) + 2 * config.max_new_tokens
    if getattr(config, "method", "reflect_retry") == "reflect_retry" and hasattr(config, "max_reflection_tokens"):
        follows = len(seam[task.reflect] + seam[task.retry]) + 2 * config.max_new_tokens + config.max_reflection_tokens
    prompts = [first_turn_ids(tokenizer, task.prompt(problem), task.shots) for problem in problems]
    spoken = [len(prompt) + len(given_ids(tokenizer, task, p)) for prompt, p in zip(prompts, problems, strict=True)]
    longest = max(range(len(prompts)), key=lambda i: spoken[i])
    if spoken[longest] + follows > sampler.limit:
        raise ValueError(
            f"problem {longest}: a prompt of {spoken[longest]} tokens and up to {follows} after it don't fit "
            f"the model's context of {sampler.limit}: lower --shots or the token limits, or leave it out"
        )
    return prompts


def given_ids(tokenizer, task: Task, problem: dict) -> list[int]:
    """The first attempt that the data gives, with the token that ends a turn; empty where the model makes its own."""
    if task.given is None:
        return []
    return encode(tokenizer, task.given(problem)) + seam_ids(tokenizer, task.correct)[:1]


def first_attempts(sampler, tokenizer, task: Task, problems, prompts, group_size, seeds, limits) -> Rollout:
    """`group_size` attempts at each problem: sampled, or given by the data; then there is no cache to go on from."""
    if task.given is None:
        return sampler.generate(prompts, group_size, seeds=seeds, **limits)
    given = [given_ids(tokenizer, task, problem) for problem in problems]
    rows = [(prompt, answer) for prompt, answer in zip(prompts, given, strict=True) for _ in range(group_size)]
    lengths = torch.tensor([len(prompt) + len(answer) for prompt, answer in rows])
    ids = torch.full((len(rows), int(lengths.max())), sampler.pad_id)
    spoken = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(rows):
        ids[row, : lengths[row]] = torch.tensor(prompt + answer)
        spoken[row, len(prompt) : lengths[row]] = True
    turn = (torch.arange(ids.shape[1]) < lengths[:, None]).long() - 1
    stopped = torch.ones(len(rows), 1, dtype=torch.bool)
    parents = torch.arange(len(prompts)).repeat_interleave(group_size)
    tensors = (ids, spoken, turn, torch.zeros(ids.shape), lengths, stopped, parents, torch.as_tensor(seeds))
    return Rollout(*(tensor.to(sampler.model.device) for tensor in tensors), cache=None)


def probe(sampler, tokenizer, task: Task, split, config, method: str, keys=("acc_t1", "acc_t2")) -> None:
    """ValueError if --probe problems at the training temperature are all right or all wrong: no signal to learn from.

    split: (problem, prompt ids) to train on. keys: the figures of the METHOD that training would reward.
    """
    if not config.probe:
        return
    chosen = pick_problems(split, config.seed, 0, min(config.probe, len(split)))
    problems, prompts = zip(*chosen, strict=True)
    figures, _ = evaluate(sampler, tokenizer, task, problems, prompts, config, config.temperature, method)
    rates = {key: figures.get(key, 1.0) for key in keys}  # no failure: there is nothing to retry
    if {*rates.values()} in ({0.0}, {1.0}):
        shown = ", ".join(f"{key} {rate:.0%}" for key, rate in rates.items())
        wrong = 0.0 in rates.values()
        raise ValueError(
            f"no signal: of {len(chosen)} training problems at T = {config.temperature:g}, {shown} "
            f"({figures['truncated']:.0%} of answers cut off). Try "
            + ("--shots 3, easier data, more --max_new_tokens or a bigger model" if wrong else "harder data")
            + "; or train all the same with --probe 0"
        )


def grade(tokenizer, task: Task, rollout, turn: int, problems: list[dict]) -> tuple[list[str], torch.Tensor]:
    """The text of every row's answer in `turn` and the verdict on it: (B,) strings, (B,) float32 of 0 and 1."""
    texts = tokenizer.batch_decode(rollout.completion_ids(turn))
    verdicts = [task.verify(text, problem) for text, problem in zip(texts, problems, strict=True)]
    return texts, torch.tensor(verdicts, dtype=torch.float32)


def go_on(sampler, maker, rollout, message: str, tokenizer, rows: list[int], limits: dict):
    """`rows` of a rollout, answered by the user's `message`: from the cache if its `maker` goes on, else encoded."""
    last = rollout.last_ids()
    seams = follow_up_ids(tokenizer, message, [last[row] for row in rows])
    if sampler is maker and rollout.cache is not None:
        return sampler.extend(rollout, seams, rows=rows, **limits)
    prompts = [rollout.ids[row, : rollout.lengths[row]].tolist() + seam for row, seam in zip(rows, seams, strict=True)]
    return sampler.generate(prompts, seeds=rollout.seeds[rows], **limits)


def second_attempts(method, first, rows, cast, tokenizer, task, limits, max_reflection_tokens):
    """(rollout whose last turn is the second attempt at `rows`, the reflections' ids or None), by a METHOD.

    cast: the samplers that (attempt, reflect, retry).
    """
    attempter, reflector, retrier = cast
    if method == "self_correct":
        return go_on(retrier, attempter, first, task.correct, tokenizer, rows, limits), None
    if method == "blind_retry":
        return go_on(retrier, attempter, first, task.retry, tokenizer, rows, limits), None
    if method == "fresh_attempt":
        prompts = [first.ids[row][(first.turn[row] == 0) & ~first.action_mask[row]].tolist() for row in rows]
        return retrier.generate(prompts, seeds=row_seeds(len(rows), "fresh", first.seeds[0].item()), **limits), None
    if method == "generic_reflection":
        text = tokenizer(task.generic_reflection, add_special_tokens=False).input_ids
        last = first.last_ids()
        between = follow_up_ids(tokenizer, task.reflect, [last[row] for row in rows])
        spoken = [first.ids[row, : first.lengths[row]].tolist() for row in rows]
        prompts = [a + b + text + seam_ids(tokenizer, task.retry) for a, b in zip(spoken, between, strict=True)]
        return retrier.generate(prompts, seeds=first.seeds[rows], **limits), None
    reflection_limits = limits | {"max_new_tokens": max_reflection_tokens}
    reflected = go_on(reflector, attempter, first, task.reflect, tokenizer, rows, reflection_limits)
    reflections = reflected.completion_ids(reflected.stopped.shape[1] - 1)
    everyone = list(range(len(rows)))
    return go_on(retrier, reflector, reflected, task.retry, tokenizer, everyone, limits), reflections


def evaluate(
    cast, tokenizer, task: Task, problems, prompts, config, temperature, method="self_correct", samples=1, seed=0
) -> tuple[dict, list[dict]]:
    """(figures, conversations) of two attempts at every problem, by one of METHODS.

    cast: one sampler, or the three that attempt, reflect and retry. config: max_new_tokens, max_reflection_tokens.
    """
    cast = cast if isinstance(cast, tuple) else (cast, cast, cast)
    limits = {"max_new_tokens": config.max_new_tokens, "temperature": temperature}
    asked, problems = problems, [problem for problem in problems for _ in range(samples)]
    seeds = row_seeds(len(problems), "evaluate", seed)
    first = first_attempts(cast[0], tokenizer, task, asked, prompts, samples, seeds, limits)
    y1 = answers_of(tokenizer, task, first, problems)
    chosen = [i for i, answer in enumerate(y1) if method == "self_correct" or not answer["right"]]
    y2, reflections = list(y1), None
    if chosen:
        second, reflections = second_attempts(
            method, first, chosen, cast, tokenizer, task, limits, getattr(config, "max_reflection_tokens", None)
        )
        retried = answers_of(tokenizer, task, second, [problems[i] for i in chosen])
        for i, answer in zip(chosen, retried, strict=True):
            y2[i] = answer
    reflections = dict(zip(chosen, reflections or [], strict=False))
    figures = summarize(row_values(y1, y2, chosen, reflections), samples)
    figures |= after_failure(y1, y2, reflections, samples)
    talks = []
    for i, problem in enumerate(problems):
        talk = {"problem": problem, "first": y1[i]["text"], "first_right": y1[i]["right"]}
        if i in reflections:
            talk["reflection"] = tokenizer.decode(reflections[i])
        talks.append(talk | {"second": y2[i]["text"], "second_right": y2[i]["right"]})
    return figures, talks


def answers_of(tokenizer, task: Task, rollout, problems: list[dict]) -> list[dict]:
    """What is to be known of each row's answer in the last turn."""
    turn = rollout.stopped.shape[1] - 1
    texts, verdicts = grade(tokenizer, task, rollout, turn, problems)
    columns = (texts, verdicts.tolist(), rollout.completion_ids(turn), rollout.stopped[:, turn].tolist(), problems)
    return [
        {"text": text, "right": right, "ids": ids, "stopped": stopped, "answer": task.answer(text, problem)}
        for text, right, ids, stopped, problem in zip(*columns, strict=True)
    ]


def row_values(y1: list[dict], y2: list[dict], chosen: list[int], reflections: dict) -> dict:
    """The figures of every row, before they are averaged. Only `chosen` rows have a second attempt of their own."""
    retried = set(chosen)
    values = []
    for i, (a, b) in enumerate(zip(y1, y2, strict=True)):
        spoken = [a, b] if i in retried else [a]
        values.append(
            {
                "acc_t1": a["right"],
                "acc_t2": b["right"],
                "delta": b["right"] - a["right"],
                "i_to_c": (1 - a["right"]) * b["right"],
                "c_to_i": a["right"] * (1 - b["right"]),
                "changed": a["answer"] != b["answer"],
                "edit_ratio": edit_distance(a["ids"], b["ids"]) / max(1, len(a["ids"]) + len(b["ids"])),
                "well_formed": sum(y["answer"] is not None for y in spoken) / len(spoken),
                "truncated": sum(not y["stopped"] for y in spoken) / len(spoken),
                "tokens": sum(len(y["ids"]) + y["stopped"] for y in spoken) + len(reflections.get(i, ())),
            }
        )
    return {name: [row[name] for row in values] for name in values[0]}


def after_failure(y1: list[dict], y2: list[dict], reflections: dict, samples: int) -> dict:
    """Figures over the wrong first attempts alone; the standard error takes a problem's samples for related."""
    wrong = np.array([not a["right"] for a in y1], dtype=float)
    columns = {
        "retry_given_failure": [b["right"] for b in y2],
        "well_formed_retry": [b["answer"] is not None for b in y2],
        "reflection_tokens": [len(reflections.get(i, ())) for i in range(len(y1))],
    }
    figures = {"failures": int(wrong.sum())}
    for name, values in columns.items() if figures["failures"] else ():
        if name == "reflection_tokens" and not reflections:
            continue
        mean = float((wrong * values).sum() / wrong.sum())
        residuals = (wrong * (np.array(values, dtype=float) - mean)).reshape(-1, samples).sum(axis=1)
        figures[name] = mean
        figures[name + "_se"] = float(np.sqrt((residuals**2).sum()) / wrong.sum())
    return figures


def summarize(values: dict, samples: int = 1) -> dict:
    """Mean and standard error (`_se`) of each figure. `samples` rows a problem are averaged first: they are related."""
    figures = {}
    for name, rows in values.items():
        means = np.asarray(rows, dtype=np.float64).reshape(-1, samples).mean(axis=1)
        figures["n"] = len(means)
        figures[name] = float(means.mean())
        figures[name + "_se"] = float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else 0.0
    return figures


def edit_distance(a: list[int], b: list[int]) -> int:
    """Levenshtein distance of two id sequences, a row of the table at a time."""
    b = np.asarray(b)
    steps = np.arange(len(b) + 1)
    row = steps
    for i, token in enumerate(a, 1):
        best = np.minimum(row[1:] + 1, row[:-1] + (b != token))
        row = np.minimum.accumulate(np.concatenate([[i], best]) - steps) + steps
    return int(row[-1])


def evaluate_both(*arguments, method: str = "self_correct", seed: int = 0) -> dict:
    """Figures under `greedy` and `sampled` (T = 1); arguments as of `evaluate`."""
    modes = {"greedy": 0.0, "sampled": 1.0}
    return {name: evaluate(*arguments, T, method, seed=seed)[0] for name, T in modes.items()}


def format_table(results: dict, columns=COLUMNS) -> str:
    """`results` maps names to `greedy` and `sampled` to figures -> a Markdown table in percent, ± standard error."""
    lines = ["| % | | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, modes in results.items():
        for mode, figures in modes.items():
            cells = [
                f"{100 * figures[c]:.1f} ± {100 * figures[c + '_se']:.1f}" if c in figures else "" for c in columns
            ]
            lines.append(f"| {name} | {mode} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def format_transcripts(conversations: list[dict], count: int = 4) -> str:
    """The first few conversations, a line an attempt, marked right or wrong."""
    lines = []
    for talk in conversations[:count]:
        lines.append(json.dumps(talk["problem"]))
        for key in ("first", "reflection", "second"):
            if key in talk:
                verdict = {0.0: "wrong: ", 1.0: "right: ", None: ""}[talk.get(key + "_right")]
                lines.append(f"  {verdict}{talk[key]}")
    return "\n".join(lines)


def compare_after_failure(base, trained, *shared, seed: int = 0) -> dict:
    """The controls, all after the base model's failures: who reflects, who retries, and what if nobody reflects."""
    casts = {"base": (base, base, base), "trained": (base, trained, trained)}
    controls = {
        f"{name}, {method}": evaluate_both(cast, *shared, method=method, seed=seed)
        for name, cast in casts.items()
        for method in METHODS
        if method != "self_correct"
    }
    for name, cast in {
        "trained reflects, base retries": (base, trained, base),
        "base reflects, trained retries": (base, base, trained),
    }.items():
        controls[name] = evaluate_both(cast, *shared, method="reflect_retry", seed=seed)
    return controls


def side_by_side(base, trained, *shared, count: int = 20) -> str:
    """Reflections on the same failures before and after training, at T = 1."""
    casts = {"before": (base, base, base), "after": (base, trained, trained)}
    talks = {name: evaluate(cast, *shared, 1.0, "reflect_retry")[1] for name, cast in casts.items()}
    lines = []
    for before, after in zip(talks["before"], talks["after"], strict=True):
        if "reflection" in before and len(lines) < 6 * count:
            lines += [json.dumps(before["problem"]), f"  wrong: {before['first']}"]
            for name, talk in (("before", before), ("after", after)):
                verdict = "right" if talk["second_right"] else "wrong"
                lines += [f"  {name}: {talk['reflection']}", f"    {verdict}: {talk['second']}"]
    return "\n".join(lines) + "\n"


def watcher(run: Path, sampler, tokenizer, task, problems, prompts, config, method: str, keys: tuple[str, ...]):
    """What a training run calls now and then: figures `eval_*` at T = 1 on the first `eval_problems`.

    A few of the conversations go to run/transcripts.txt.
    """
    few = slice(config.eval_problems)

    def evaluate_now(step: int) -> dict:
        figures, talks = evaluate(sampler, tokenizer, task, problems[few], prompts[few], config, 1.0, method)
        with open(run / "transcripts.txt", "a") as file:
            file.write(f"step {step + 1}\n{format_transcripts(talks)}\n\n")
        return {f"eval_{key}": figures[key] for key in keys if key in figures}

    return evaluate_now


def report(run: Path, results: dict, count: int, columns=COLUMNS) -> None:
    """A run's end: results.json, curves.png, and the tables of base and trained model and of any `controls`."""
    (run / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    plot_curves(run)
    models = {name: modes for name, modes in results.items() if name != "controls"}
    print(f"\n{count} validation problems:\n\n{format_table(models, columns)}")
    if "controls" in results:
        columns = ("retry_given_failure", "well_formed_retry")
        print(f"\nAfter the base model's failures:\n\n{format_table(results['controls'], columns)}")
    print(f"\nrun: {run}")


def plot_curves(run: Path, smooth: int = 10) -> None:
    """`curves.png` of a run, from metrics.jsonl: what its training batches got right, step by step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figure, axis = plt.subplots(figsize=(7, 4))
    curves = {"acc_t1": "first attempt", "acc_t2": "second attempt"}
    for key, label in (curves if "acc_t1" in rows[0] else {"reward": "retry after a failure"}).items():
        values = np.array([row[key] for row in rows if key in row])
        if len(values):
            width = min(smooth, len(values))
            mean = np.convolve(values, np.ones(width) / width, "valid") * 100
            axis.plot(np.arange(len(mean)) + width - 1, mean, label=label)
    boundary = next((i for i, row in enumerate(rows) if row["stage"] == 2), 0)
    if boundary:
        axis.axvline(boundary, color="gray", linestyle=":", label="Stage II begins")
    axis.set(xlabel="step", ylabel=f"right, % of the training batch (mean of the last {smooth})")
    axis.legend()
    figure.tight_layout()
    figure.savefig(run / "curves.png", dpi=120)
    plt.close(figure)


def main(config: Config) -> None:
    with exit_on_bad_input():
        if config.split not in SPLITS:
            raise ValueError(f"--split {config.split}: choose one of {', '.join(SPLITS)}")
        if config.temperature < 0 or config.samples > 1 and not config.temperature:
            raise ValueError("--temperature must be 0 (greedy, and one sample) or above")
        if config.output and (Path(config.output).exists() or not Path(config.output).parent.is_dir()):
            raise ValueError(f"--output {config.output}: it exists, or its directory does not; name a new file")
        check_counts(config)
        task, sampler, tokenizer, splits = prepare(config, {config.split: config.limit})
        reflector = Sampler(load_model(config.reflector)[0], tokenizer) if config.reflector else sampler
    cast = (sampler, reflector, sampler)
    columns = zip(*splits[config.split], strict=True)
    figures, conversations = evaluate(
        cast, tokenizer, task, *columns, config, config.temperature, config.method, config.samples, config.seed
    )
    print(format_transcripts(conversations))
    print(f"{figures['n']} {config.split} problems\n")
    columns = COLUMNS if config.method == "self_correct" else (*COLUMNS, "retry_given_failure", "well_formed_retry")
    print(format_table({config.model: {"sampled" if config.temperature else "greedy": figures}}, columns))
    if config.output:
        Path(config.output).write_text(json.dumps(figures | {"conversations": conversations}, indent=1) + "\n")


if __name__ == "__main__":
    main(parse_args(Config))
