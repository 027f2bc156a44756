"""Several attempts at a problem: what comes between them, and the conversations that result.

A method goes on from rollouts of first attempts, whoever made them; figures are none of its
business (report/figures.py).
"""

from dataclasses import replace
from typing import NamedTuple

from report.figures import values_of
from sampling.turns import encode
from training.batches import row_seeds

METHODS = {
    "self_correct": "asked to correct itself after any answer, right or wrong (SCoRe)",
    "self_refine": "after any answer, criticises it, then rewrites it",
    "reflect_retry": "after a wrong answer, reflects and tries again (RRR)",
    "blind_retry": "after a wrong answer, is told to try again, with no reflection",
    "generic_reflection": "the same, after a fixed reflection in its own name that knows nothing "
    "of the problem",
    "fresh_attempt": "after a wrong answer, a new first attempt from an empty context",
}
BETWEEN = {  # what is said between two attempts; with two, the model has a say after the first
    "self_correct": ("correct",),
    "self_refine": ("critique", "rewrite"),
    "reflect_retry": ("reflect", "retry"),
    "blind_retry": ("retry",),
}
AFTER_ANY = ("self_correct", "self_refine")  # the others go on after a wrong answer only


class Protocol(NamedTuple):
    """How a model is tried: one of METHODS, the limits, and how many conversations a problem."""

    method: str
    temperature: float
    max_new_tokens: int
    max_reflection_tokens: int
    attempts: int = 2
    samples: int = 1
    seed: int = 0
    cache_tokens: int | None = None
    ids: bool = False  # whether a conversation keeps its `contexts`

    @property
    def limits(self) -> dict:
        return {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature}


def converse(ways, env, problems, seeds, protocol) -> dict[str, list[dict]]:
    """{way: conversations}, `samples` rows a problem; all ways share the first attempts."""
    ((sampler, *_), _), *_ = ways.values()
    first = env.first_attempts(sampler, problems, protocol.samples, seeds, **protocol.limits)
    # one for each way, which takes it along: when the last has gone on, the cache's memory is free
    firsts, first = [(first, attempts_of(env, first, problems))] * len(ways), None
    return {
        name: go_on(cast, env, problems, firsts, protocol._replace(method=method))
        for name, (cast, method) in ways.items()
    }


def go_on(cast, env, problems, firsts: list, protocol) -> list[dict]:
    """The conversations after the last of `firsts`, as report/figures.py wants them.

    A rollout that nobody else goes on from is given up on the way.
    """
    rollout, answers = firsts.pop()
    free = not firsts  # else other ways go on from the first attempts
    attempts = [[answer] for answer in answers]
    asked = [problem for problem in problems for _ in range(protocol.samples)]
    said = [[] for _ in asked]
    rows = list(range(len(asked)))  # which conversation a row of the rollout belongs to
    contexts = [[] for _ in asked]
    remember(contexts, rows, rollout, protocol)
    for _ in range(protocol.attempts - 1):
        right = [attempts[row][-1]["right"] for row in rows]
        chosen = [i for i in range(len(rows)) if protocol.method in AFTER_ANY or not right[i]]
        if not chosen:
            break
        rollout, between = next_attempts(cast, env, rollout, chosen, protocol, free)
        free = True
        rows = [rows[i] for i in chosen]  # those that have ended leave
        if between is not None:
            remember(contexts, rows, between, protocol)
            for row, ids in zip(rows, between.completion_ids(between.stopped.shape[1] - 1)):
                said[row].append(ids)
        for i, answer in enumerate(attempts_of(env, rollout, problems)):
            attempts[rows[i]].append(answer)
        remember(contexts, rows, rollout, protocol)
    kept = ("text", "answer", "right", "reward")
    return [
        {
            "problem": problem,
            "attempts": [{key: y[key] for key in kept if key in y} for y in ys],
            "said": [env.tokenizer.decode(ids) for ids in words],
            "values": values_of(ys, words, protocol.attempts),
        }
        | ({"contexts": context} if protocol.ids else {})
        for problem, ys, words, context in zip(asked, attempts, said, contexts, strict=True)
    ]


def remember(contexts: list[list], rows: list[int], rollout, protocol) -> None:
    """Into the contexts of conversations `rows`: the turns of a rollout's rows.

    A context is a list of turns, each [ids told, ids said, whether it stopped, log-probs]. One that
    goes on keeps its turns: to a model that has to encode them anew they are a prompt. Fresh
    attempts begin another one.
    """
    if not protocol.ids:
        return
    tensors = (rollout.ids, rollout.logprobs, rollout.action_mask, rollout.turn, rollout.stopped)
    tensors = [x.cpu() for x in tensors]
    for row, kept in enumerate(contexts[number] for number in rows):
        ids, logprobs, said, turn, stopped = (x[row] for x in tensors)
        before = kept.pop() if kept and len(kept[-1]) < len(stopped) else []
        context = before[:]
        for number in range(len(before), len(stopped)):
            told, spoken = (turn == number) & ~said, (turn == number) & said
            parts = [ids[told].tolist(), ids[spoken].tolist(), bool(stopped[number])]
            context.append([*parts, logprobs[spoken].tolist()])
        kept.append(context)


def next_attempts(cast, env, before, rows, protocol, free=False):
    """(rollout that ends in the next attempt at `rows`, that of what was said between or None).

    free: give up the cache of `before`.
    """
    (_, reflector, retrier), method, limits = cast, protocol.method, protocol.limits

    def answer(sampler, rollout, message, rows, words=(), **changed):
        more = [[*seam, *words] for seam in env.follow_up(rollout, message, rows)]
        seeds = rollout.seeds[rows]  # for a sampler that has to encode what another one said
        return sampler.extend(rollout, more, rows=rows, seeds=seeds, **(limits | changed))

    if len(BETWEEN.get(method, ())) == 1:
        return answer(retrier, before, *BETWEEN[method], rows, free=free), None
    if free and method in ("fresh_attempt", "generic_reflection"):
        before.cache = None  # they don't go on from it
    if method == "fresh_attempt":
        seeds = [row_seeds(1, "fresh", seed)[0] for seed in before.seeds[rows].tolist()]
        told = (before.turn == 0) & ~before.action_mask
        prompts = [before.ids[row][told[row]].tolist() for row in rows]
        again = retrier.generate(prompts, seeds=seeds, **limits)
        again.prompt_index = before.prompt_index[rows]
        return again, None
    if method == "generic_reflection":
        words = encode(env.tokenizer, env.task.generic_reflection) + env.seam("retry")
        # encoded anew, though its cache is there, since the published figures were made so: a
        # row's draws are those of its own seed, not of a child's
        afresh = replace(before, cache=None)
        return answer(retrier, afresh, "reflect", rows, words), None
    ask, then = BETWEEN[method]
    longest = {"max_new_tokens": protocol.max_reflection_tokens}
    said = answer(reflector, before, ask, rows, free=free, **longest)
    retried = answer(retrier, said, then, list(range(len(rows))), free=True)
    return retried, said


def attempts_of(env, rollout, problems: list[dict]) -> list[dict]:
    """What is to be known of each row's answer in the last turn."""
    turn = rollout.stopped.shape[1] - 1
    right, texts, answers, rewards = env.verdicts(rollout, turn, problems)
    ids, stopped = rollout.completion_ids(turn), rollout.stopped[:, turn].tolist()
    names = ("text", "right", "ids", "stopped", "answer")
    columns = (texts, right.tolist(), ids, stopped, answers)
    if env.task.file:  # whose rewards may have parts
        names, columns = (*names, "reward"), (*columns, rewards.tolist())
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
