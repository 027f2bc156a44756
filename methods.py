"""What comes between two attempts: self-correction, Self-Refine, reflection and retry, and the
controls."""

from sampling.turns import encode, follow_up_ids, seam_ids
from training.policy import row_seeds

METHODS = {
    "self_correct": "asked to correct itself after any answer, right or wrong (SCoRe)",
    "self_refine": "after any answer, criticises it, then rewrites it",
    "reflect_retry": "after a wrong answer, reflects and tries again (RRR)",
    "blind_retry": "after a wrong answer, is told to try again, with no reflection",
    "generic_reflection": "the same, after a fixed reflection in its own name that knows nothing of the problem",
    "fresh_attempt": "after a wrong answer, a new first attempt from an empty context",
}
AFTER_ANY = ("self_correct", "self_refine")  # the others go on after a wrong answer only


def go_on(
    sampler, maker, rollout, message: str, tokenizer, rows: list[int], limits: dict, given=()
):
    """`rows` of a rollout, answered by the user's `message`: from the cache if its `maker` goes on,
    else encoded.

    given: ids between the message and where the sampler begins.
    """
    last = rollout.last_ids()
    seams = [
        [*seam, *given] for seam in follow_up_ids(tokenizer, message, [last[row] for row in rows])
    ]
    if sampler is maker and rollout.cache is not None:
        return sampler.extend(rollout, seams, rows=rows, **limits)
    spoken = rollout.row_ids()
    prompts = [spoken[row] + seam for row, seam in zip(rows, seams, strict=True)]
    return sampler.generate(prompts, seeds=rollout.seeds[rows], **limits)


def next_attempts(
    method, before, rows, cast, maker, tokenizer, task, limits, max_reflection_tokens
):
    """(rollout whose last turn is the next attempt at `rows`, what was said between as ids or
    None), by a METHOD.

    cast: the samplers that (attempt, reflect, retry). maker: the one that has the cache of
        `before`.
    """
    _, reflector, retrier = cast
    if method in ("self_correct", "blind_retry"):
        message = task.correct if method == "self_correct" else task.retry
        return go_on(retrier, maker, before, message, tokenizer, rows, limits), None
    if method == "fresh_attempt":
        prompts = [
            before.ids[row][(before.turn[row] == 0) & ~before.action_mask[row]].tolist()
            for row in rows
        ]
        seeds = [row_seeds(1, "fresh", seed)[0] for seed in before.seeds[rows].tolist()]
        return retrier.generate(prompts, seeds=seeds, **limits), None
    if method == "generic_reflection":
        given = encode(tokenizer, task.generic_reflection) + seam_ids(tokenizer, task.retry)
        return go_on(retrier, None, before, task.reflect, tokenizer, rows, limits, given), None
    ask, then = (
        (task.critique, task.rewrite) if method == "self_refine" else (task.reflect, task.retry)
    )
    said = go_on(
        reflector,
        maker,
        before,
        ask,
        tokenizer,
        rows,
        limits | {"max_new_tokens": max_reflection_tokens},
    )
    retried = go_on(retrier, reflector, said, then, tokenizer, list(range(len(rows))), limits)
    return retried, said.completion_ids(said.stopped.shape[1] - 1)
