"""A talk with a model: what it says, what it is told then, and what it says next, as it says it.

    python talk.py --model runs/score/checkpoint "8 19 16 make 24"
    python talk.py                            # asks for questions, until Ctrl-D

--method says what comes between two attempts. Where the task can judge an answer to a question of
yours (tiny, countdown; a problem of a --task FILE.py, as JSON), a verdict stands behind it; of
others nobody knows whether they are right, and methods that go on after wrong answers then go on
after any.
"""

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import count, zip_longest
from pathlib import Path
from textwrap import wrap

from sampler import Sampler
from sandbox.own import shortened
from tasks.base import PLACEHOLDER, Task
from tasks.env import Env
from tasks.loading import load_task, task_of
from tasks.own import LIMITS, WORDS, is_own, limits_of
from training import distributed
from training.command import DATA
from training.distributed import Stopped
from training.fitting import tasks_own
from training.flags import TaskConfig, exit_on_bad_input, flag, run_script
from training.methods import AFTER_ANY, BETWEEN
from training.models import check_flags, compute_dtype, load_model
from training.progress import said_if_slow
from training.run import read_config
from training.setup import check_words, require_end, with_room

MARGIN = 9  # columns in which it stands who speaks
VERDICTS = {True: "right", False: "wrong", None: ""}


@dataclass
class Config(TaskConfig):
    question: str | None = flag(None, "what to ask; default: asks you", positional=True)
    task: str | None = flag(
        None,
        "as in score.py; default: that of the run whose checkpoint --model is, else the embedded "
        "model's, else none: the question is asked as it is",
        group=DATA,
    )
    beside: str | None = flag(None, "another model, to be asked the same, in a column of its own")
    method: str = flag("self_correct", "what comes between attempts", choices=tuple(BETWEEN))
    attempts: int = flag(2, "attempts a conversation, the first included")
    temperature: float = flag(0.0, "0 is greedy")
    max_new_tokens: int = flag(16, "token limit of an attempt", other=tasks_own("max_new_tokens"))
    max_reflection_tokens: int = flag(
        72, "token limit of a reflection or critique", other=tasks_own("max_reflection_tokens")
    )
    seed: int = flag(0, "seed of the sampling")

    own_flags = "talk"  # their heading in --help


def task_for(config) -> Task:
    """The one that --model was trained on, unless another is asked for."""
    if config.task is None:
        run = read_config(Path(config.model).parent / "config.json")
        config.task, config.prompts = run.get("task"), config.prompts or run.get("prompts")
        config.task = config.task or ("tiny" if config.embedded else None)
        take_limits(config)
    if config.task:
        shown = config.shots or config.shots_file  # examples need problems
        return load_task(config, ["train"])[0] if shown else task_of(config)
    words = WORDS | {"critique": WORDS["reflect"], "rewrite": WORDS["correct"]}
    unused = dict.fromkeys(("answer", "verify", "key", "solution"))
    return Task(name="any", first="{question}", view={}, **words, **unused)


def take_limits(config) -> None:
    """Those of a task that no flag has named, where flags say no others."""
    own = limits_of(config.task) if is_own(config.task) else {}
    for f in fields(config):
        if config.task and f.name in LIMITS and f.name not in config.asked:
            fits = f.default if config.embedded else f.metadata["other"].of(config.task)
            setattr(config, f.name, own.get(f.name, fits))


def load(name: str, task: Task, config) -> tuple[Sampler, Env]:
    with said_if_slow(f"loading {name} ..."):
        model, tokenizer = load_model(name, dtype=compute_dtype(config), base=config.base)
        sampler = Sampler(model, tokenizer, block=1)  # every token is shown
    env = Env(task, tokenizer)
    require_end(env, sampler)
    return sampler, env


def asked(task: Task, question: str) -> tuple[Task, dict, bool]:
    """(the task with this question, the problem, whether it can judge an answer)"""
    problem = task.ask(question) if task.ask else None  # an own task takes one as JSON
    if problem:
        return task, problem, True
    names = {*PLACEHOLDER.findall(task.first)}
    first = task.first if len(names) == 1 else "{question}"  # of several it can't fill all
    view = {name: lambda problem: problem["question"] for name in (*names, "question")}
    own = {"first": first, "view": view, "messages": None, "given": None}
    return replace(task, **own), {"question": question}, False


def converse(sampler, env: Env, question: str, config, seed: int, say) -> None:
    """One conversation, told by say(kind, text): user; model, pieces of what it says; and verdict,
    right, wrong or nothing, when it has said it. ValueError for a question it can't be asked.
    """
    if not question.strip():
        raise ValueError("the question is empty")
    task, problem, judges = asked(env.task, question)
    env, method, last = Env(task, env.tokenizer, env.day), config.method, config.attempts - 1
    with_room(env, sampler, [problem], None, config)
    prompt = task.prompt(problem)
    prompt = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    check_words(env.tokenizer, prompt)
    say("user", prompt)
    sampler.on_tokens, how = teller(sampler, say), limits(config)
    rollout = env.first_attempts(sampler, [problem], 1, [seed], **how)
    for attempt in range(config.attempts):
        turn = rollout.stopped.shape[1] - 1
        verdicts = env.verdicts(rollout, turn, [problem]) if judges else None
        right = bool(verdicts.right) if judges else None
        part = float(verdicts.rewards) % 1 if judges else 0.0  # of a reward
        say("verdict", (f"{part:.3g}" if part else VERDICTS[right]) + cut_off(rollout))
        if attempt == last or (right and method not in AFTER_ANY):
            return
        for message in BETWEEN[method]:
            said = message in ("reflect", "critique")  # which nobody judges
            say("user", getattr(task, message))
            sampler.on_tokens, how = teller(sampler, say), limits(config, said)
            rollout = sampler.extend(rollout, env.follow_up(rollout, message), free=True, **how)
            if said:
                say("verdict", cut_off(rollout))


def limits(config, said: bool = False) -> dict:
    most = config.max_reflection_tokens if said else config.max_new_tokens
    return {"max_new_tokens": most, "temperature": config.temperature}


def cut_off(rollout) -> str:
    return "" if rollout.stopped[0, -1] else " (cut off)"


def teller(sampler, say):
    """A hook of the sampler's for one turn, which says what is new in its text."""
    ids, shown = [], 0

    def hear(_, new: list[list[int]]) -> None:
        nonlocal shown
        ids.extend(i for i in new[0] if not sampler.is_stop[i])
        text = sampler.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        text = text.rstrip("\ufffd")  # half a letter
        say("model", text[shown:])
        shown = max(shown, len(text))

    return hear


def aloud(kind: str, text: str) -> None:
    """Prints a conversation as it goes."""
    text = text.replace("\n", "\n" + " " * MARGIN)
    if kind == "user":
        text = f"{kind:<{MARGIN}}{text}\n{'model':<{MARGIN}}"
    elif kind == "verdict":
        text = f"  {text.strip()}".rstrip() + "\n"
    print(text, end="", flush=True)


def heard(*conversation) -> list[str]:
    """What is said in one, in turn, by the arguments of `converse` but the last."""
    lines = []

    def note(kind: str, text: str) -> None:
        if kind == "user":
            lines.extend([text, ""])
        else:
            lines[-1] += f"  {text.strip()}".rstrip() if kind == "verdict" else text

    converse(*conversation, note)
    return lines


def side_by_side(names: list[str], talks: list[list[str]]) -> str:
    """Conversations as columns under their models' names."""
    width = (shutil.get_terminal_size((100, 24)).columns - MARGIN) // len(names) - 2
    width, lines = max(8, width), []
    rows = zip_longest(*([name, *talk] for name, talk in zip(names, talks)), fillvalue="")
    for number, texts in enumerate(rows):  # one talk may have ended before the other
        who = ("model" if number else "") if number % 2 == 0 else "user"
        cells = [[w for line in t.split("\n") for w in wrap(line, width) or [""]] for t in texts]
        for row in zip_longest(*cells, fillvalue=""):
            line = "  ".join(f"{cell:<{width}}" for cell in row)
            lines.append(f"{who:<{MARGIN}}{line}".rstrip())
            who = ""
    return "\n".join(lines)


@cache
def how_to_ask(name: str, generate) -> str:
    """Said of a question that is no problem of a task in the user's file."""
    problem = {"...": "..."}
    with suppress(ValueError), said_if_slow(f"listing the problems of {name} ..."):
        problem = generate("train", 0)[0]  # or the file has none of its own
    asked = shortened(json.dumps(problem, ensure_ascii=False))
    return f"({name}: asked as it is, without prompt and verdict; a problem, as JSON: {asked})"


def answer(names: list[str], models: list, *question) -> None:
    task, said = models[0][1].task, question[0]
    if task.file and not task.ask(said):
        print(how_to_ask(task.name, task.generate))
    if len(models) == 1:
        converse(*models[0], *question, aloud)
    else:
        with said_if_slow("both answer ..."):
            talks = [heard(*model, *question) for model in models]
        print(side_by_side(names, talks))


def main(config: Config) -> None:
    with exit_on_bad_input():
        distributed.start(config)
        check_flags(config)
        task, names = task_for(config), [config.model] + [config.beside] * bool(config.beside)
        models = [load(name, task, config) for name in names]
        if config.question is not None:
            return answer(names, models, config.question, config, config.seed)
    with suppress(ImportError):
        import readline  # noqa: F401, input() has it then
    for seed in count(config.seed):
        try:
            question = input("> ")
        except EOFError:
            return print()
        try:
            answer(names, models, question, config, seed)
        except Stopped:  # Ctrl-C ends an answer; at the prompt, the talk
            print()
        except ValueError as error:  # ask something else
            print(f"error: {error}")


if __name__ == "__main__":
    run_script(main, Config)
