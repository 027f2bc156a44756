"""A talk with a model: what it says, what it is told then, and what it says next, as it says it.

    python talk.py --model runs/score/checkpoint "8 19 16 make 24"
    python talk.py                            # asks for questions, until Ctrl-D

--method says what comes between two attempts. A task that can judge an answer to a question of
yours (tiny, countdown) puts a verdict behind it; nobody knows of others whether they are right, and
methods that go on after wrong answers then go on after any.
"""

import shutil
import textwrap
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count, zip_longest

from sampler import Sampler
from sampling.turns import encode
from tasks.base import PLACEHOLDER
from tasks.env import Env
from tasks.loading import load_task, task_of
from training.fitting import tasks_own
from training.flags import TaskConfig, exit_on_bad_input, flag, run_script
from training.methods import AFTER_ANY, METHODS, Protocol, next_attempts
from training.models import check_flags, compute_dtype, load_model
from training.progress import said_if_slow
from training.setup import require_end

TALKS = [name for name in METHODS if name not in ("generic_reflection", "fresh_attempt")]
MARGIN = 9  # columns in which it stands who speaks


@dataclass
class Config(TaskConfig):
    question: str | None = flag(
        None, "what to ask; default: asks you, again and again", positional=True
    )
    beside: str | None = flag(None, "another model, to be asked the same, in a column of its own")
    method: str = flag("self_correct", "what comes between attempts", choices=tuple(TALKS))
    attempts: int = flag(2, "attempts a conversation, the first included")
    temperature: float = flag(0.0, "0 is greedy")
    max_new_tokens: int = flag(16, "token limit of an attempt", other=tasks_own("max_new_tokens"))
    max_reflection_tokens: int = flag(
        72,
        "token limit of a reflection or critique",
        other=tasks_own("max_reflection_tokens"),
    )
    seed: int = flag(0, "seed of the sampling")

    own_flags = "talk"  # their heading in --help


def load(name: str, config) -> tuple[Sampler, Env]:
    with said_if_slow(f"loading {name} ..."):
        model, tokenizer = load_model(name, dtype=compute_dtype(config), base=config.base)
        sampler = Sampler(model, tokenizer, block=1)  # every token is shown
    told = config.data or config.shots or config.shots_file  # examples need problems
    env = Env(load_task(config, ["train"])[0] if told else task_of(config), tokenizer)
    require_end(env, sampler)
    return sampler, env


def converse(sampler, env: Env, question: str, config, seed: int, say) -> None:
    """One conversation, told by say(kind, text): user; model, pieces of what it says; and verdict,
    right, wrong or nothing, when it has said it. ValueError for a question it can't be asked.
    """
    check_words(env.tokenizer, question)
    task, problem, judges = asked(env.task, question)
    env = Env(task, env.tokenizer, env.day)
    protocol = Protocol(**{n: getattr(config, n) for n in Protocol._fields if n != "samples"})
    with overheard(sampler, env, say) as told:
        told("user", question)
        rollout = env.first_attempts(sampler, [problem], 1, [seed], **protocol.limits)
        for left in reversed(range(config.attempts)):
            turn = rollout.stopped.shape[1] - 1
            right = bool(env.verdicts(rollout, turn, [problem]).right) if judges else None
            told("verdict", {True: "right", False: "wrong", None: ""}[right])
            if not left or (right and config.method not in AFTER_ANY):
                return
            rollout, _ = next_attempts((sampler,) * 3, env, rollout, [0], protocol, free=True)


def asked(task, question: str):
    """(the task with this question, the problem, whether it can judge an answer)"""
    problem = task.ask(question) if task.ask else None
    if problem:
        return task, problem, True
    names = PLACEHOLDER.findall(task.first)
    first = task.first if len(names) == 1 else "{question}"  # of several it can't fill all
    view = {name: lambda problem: problem["question"] for name in (*names, "question")}
    own = {"first": first, "view": view, "messages": None, "given": None}
    return replace(task, **own), {"question": question}, False


def check_words(tokenizer, question: str) -> None:
    """ValueError if the model has no token for a word, as the embedded one for most."""
    none = {tokenizer.unk_token_id, tokenizer.pad_token_id}
    for word in question.split():
        if none & {*encode(tokenizer, word)}:
            raise ValueError(f"the model has no word for {word!r}")


@contextmanager
def overheard(sampler, env, say):
    """Around a conversation: what is said to the model and by it, as it is sampled."""
    ids, shown = [], ""

    def told(kind: str, text: str) -> None:
        nonlocal shown
        if kind == "user" and ids:  # what it has said is a reflection, which nobody judges
            say("verdict", "")
        ids.clear()
        shown = ""
        say(kind, text)

    def hear(_, new: list[list[int]]) -> None:
        nonlocal shown
        ids.extend(i for i in new[0] if not sampler.is_stop[i])
        text = sampler.tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # half a letter
            say("model", text[len(shown) :])
            shown = text

    def follow_up(rollout, message, rows=None):
        told("user", getattr(env.task, message))
        return Env.follow_up(env, rollout, message, rows)

    env.follow_up, sampler.on_tokens = follow_up, hear
    try:
        yield told
    finally:
        sampler.on_tokens = None


def aloud(kind: str, text: str) -> None:
    """Prints a conversation as it goes."""
    text = text.replace("\n", "\n" + " " * MARGIN)
    if kind == "user":
        print(f"{kind:<{MARGIN}}{text}\n{'model':<{MARGIN}}", end="", flush=True)
    elif kind == "model":
        print(text, end="", flush=True)
    else:
        print(f"  {text}" if text else "")


def heard(*conversation) -> list[list[str]]:
    """A whole conversation, of `converse` but for its last argument: [who, what]."""
    lines = []

    def note(kind: str, text: str) -> None:
        if kind == "user":
            lines.extend([[kind, text], ["model", ""]])
        else:
            lines[-1][1] += f"  {text}".rstrip() if kind == "verdict" else text

    converse(*conversation, note)
    return lines


def side_by_side(names: list[str], talks: list[list]) -> str:
    """Conversations as columns under their models' names."""
    width = (shutil.get_terminal_size((100, 24)).columns - MARGIN) // len(names) - 2
    rows = [("", names)]
    for turns in zip_longest(*talks, fillvalue=("", "")):  # one may have ended before
        rows.append((max(who for who, _ in turns), [text for _, text in turns]))
    lines = []
    for who, texts in rows:
        parts = [[w for line in t.split("\n") for w in textwrap.wrap(line, width)] for t in texts]
        for i, cells in enumerate(zip_longest(*parts, fillvalue="")):
            label = "" if i else who
            line = f"{label:<{MARGIN}}" + "".join(f"{cell:<{width + 2}}" for cell in cells)
            lines.append(line.rstrip())
    return "\n".join(lines)


def answer(models: dict, *asked) -> None:
    if len(models) == 1:
        (model,) = models.values()
        converse(*model, *asked, aloud)
    else:
        print(side_by_side([*models], [heard(*model, *asked) for model in models.values()]))


def main(config: Config) -> None:
    with exit_on_bad_input():
        check_flags(config)
        names = [config.model, config.beside] if config.beside else [config.model]
        if len(names) > len({*names}):
            raise ValueError(f"--beside {config.beside}: this is --model")
        models = {name: load(name, config) for name in names}
        if config.question is not None:
            return answer(models, config.question, config, config.seed)
    for seed in count(config.seed):
        try:
            question = input("> ").strip()
        except EOFError:
            return print()
        try:
            if question:
                answer(models, question, config, seed)
        except ValueError as error:  # ask something else
            print(f"error: {error}")


if __name__ == "__main__":
    run_script(main, Config)
