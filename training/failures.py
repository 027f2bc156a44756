"""A file of failures: wrong first attempts as exact ids, for RRR to reflect on."""

import json
from pathlib import Path

from sampling.turns import today
from tasks.sources import naming, read_rows, take
from training.checkpoint import write_text
from training.distributed import on_first
from training.models import fingerprint
from training.parts import check_cache
from training.run import check_run


def write_failures(path: Path, found: tuple[list[dict], float], model, config, day: str) -> None:
    """A new file, complete or not at all; its first line says where the failures came from.

    found: (failures, success rate); day: of their prompts.
    """
    failures, success = found
    origin = {"model": config.model, "fingerprint": fingerprint(model), "task": config.task}
    origin |= {"seed": config.seed, "success_rate": success, "day": day}
    lines = [{"origin": origin}, *failures]
    on_first(write_text, path, "".join(json.dumps(line) + "\n" for line in lines))
    print(f"{len(failures)} failures, success rate {success:.3f}: {path}")


def check_day(config) -> str:
    """The day of a run's prompts (sampling/turns.py), after `check_run`.

    Given failures bring their own, since their prompts were made on it.
    """
    if config.collect:
        return on_first(today)
    day = check_run(config)
    given = config.failures if config.group == "failure" else None
    return on_first(_day_of, given) if given else day


def _day_of(path: str) -> str:
    where, head = read_rows(path)[0]
    with naming(where):
        (origin,) = take(head, origin=dict)
        return take(origin, day=str)[0] if "day" in origin else today()


def read_failures(path: str, env, sampler, config) -> list[dict]:
    """The failures of a file, of this model and task. All else is a ValueError naming the line."""
    (where, head), *rows = read_rows(path)
    with naming(where):
        (origin,) = take(head, origin=dict)
    expected = {"task": config.task, "fingerprint": fingerprint(sampler.model)}
    if any(origin.get(key) != value for key, value in expected.items()):
        was = f"of model {origin.get('model')} on task {origin.get('task')}"
        raise ValueError(
            f"{path} has failures {was}, not of --model and --task: collect their own "
            "with --collect"
        )
    if not rows:
        raise ValueError(f"{path} has no failures: collect some with --collect")
    after = len(env.seam("reflect") + env.seam("retry"))
    after += config.max_reflection_tokens + config.max_new_tokens
    for where, failure in rows:
        with naming(where):
            check_failure(failure, env, sampler, after)
    failures = [failure for _, failure in rows]
    check_cache(env, sampler, failures, config, config.rows_each)
    return failures


def check_failure(failure: dict, env, sampler, after: int) -> None:
    """ValueError if it is not a failure of this tokenizer with room for `after` tokens after it."""
    problem, prompt, answer = take(failure, problem=dict, prompt_ids=list, answer_ids=list)
    try:
        known = [prompt] == env.prompts([problem])
    except (KeyError, TypeError):
        known = False
    if not known:
        raise ValueError("field 'prompt_ids' is not this tokenizer's prompt of 'problem'")
    if not all(type(i) is int and 0 <= i < len(sampler.is_stop) for i in answer):
        raise ValueError(f"field 'answer_ids' must be ids below {len(sampler.is_stop)}")
    if len(prompt) + len(answer) + after > sampler.limit:
        raise ValueError(f"with {after} tokens after it, it exceeds {sampler.limit} positions")
