"""A task as a model meets it: prompts and follow-ups as token ids, and verdicts on what it said.

An algorithm asks an `Env` for three things: the first prompts of some problems, the ids that follow
an answer, and verdicts. What lies between text and ids is here, and nowhere in an algorithm.
"""

import json
from typing import NamedTuple

import torch
from torch import Tensor

from sampling.rollout import Rollout, rollout_of
from sampling.turns import encode, first_turn_ids, follow_up_ids, seam_ids, today
from sandbox.cores import share_of_cores
from verifiers import verify_batch


class Verdicts(NamedTuple):
    """What the verifier says of one turn of a rollout's B rows."""

    right: Tensor  # (B,) float32: 1 right, 0 wrong
    texts: list[str]  # (B,) what was said, without the stop token
    answers: list[str | None]  # (B,) the answer in it that was judged; None: not well-formed
    rewards: Tensor  # (B,) float32: as `right`, or of an own task from 0 to 1


class Env:
    """A task, and the tokenizer through which one model meets it.

    day: for chat templates that print the date (sampling/turns.py); by default now, for good.
    """

    def __init__(self, task, tokenizer, day: str | None = None):
        self.task, self.tokenizer, self.day = task, tokenizer, day or today()
        self._prompts = {}  # by text: every epoch asks for the same ones again

    def prompts(self, problems: list[dict]) -> list[list[int]]:
        """First prompts as ids, with system message and examples, up to where the answer begins."""
        asked = [self.task.prompt(problem) for problem in problems]
        keys = [json.dumps(messages) for messages in asked]
        for key, messages in zip(keys, asked, strict=True):
            if key not in self._prompts:
                told = (messages, self.task.shots, self.day, self.task.system)
                self._prompts[key] = first_turn_ids(self.tokenizer, *told)
        return [self._prompts[key] for key in keys]

    def first_attempts(self, sampler, problems, group_size: int, seeds, **limits) -> Rollout:
        """`group_size` attempts at each problem: sampled, or given by the data, without a cache.

        seeds: (problems * group_size,) ints; limits: of `Sampler.generate`.
        """
        prompts = self.prompts(problems)
        if self.task.given is None:
            return sampler.generate(prompts, group_size, seeds=seeds, **limits)
        given = [self.given_ids(problem) for problem in problems]
        parts = zip(prompts, given, strict=True)
        rows = [[prompt, answer] for prompt, answer in parts for _ in range(group_size)]
        index = torch.arange(len(prompts)).repeat_interleave(group_size)
        return rollout_of(rows, 1, sampler, index, seeds)

    def given_ids(self, problem: dict) -> list[int]:
        """The first attempt that the data gives, with the token that ends a turn; else empty."""
        if self.task.given is None:
            return []
        return encode(self.tokenizer, self.task.given(problem)) + self.seam("correct")[:1]

    def follow_up(self, rollout: Rollout, message: str | list[str], rows=None) -> list[list[int]]:
        """The ids to append to `rows` of a rollout (default: all), for `Sampler.extend`.

        message: the name of one of the task's (correct, reflect, retry, critique, rewrite), or the
        user's words themselves, a text for each row: feedback on what that row said, say.
        """
        last = rollout.last_ids()
        last = last if rows is None else [last[row] for row in rows]
        if isinstance(message, str):
            return follow_up_ids(self.tokenizer, getattr(self.task, message), last, self.day)
        pairs = zip(message, last, strict=True)
        return [follow_up_ids(self.tokenizer, text, [id_], self.day)[0] for text, id_ in pairs]

    def seam(self, message: str) -> list[int]:
        """All that stands between an answer's text and the next one, with the task's message."""
        return seam_ids(self.tokenizer, getattr(self.task, message), self.day)

    def verdicts(self, rollout: Rollout, turn: int, problems: list[dict]) -> Verdicts:
        """On every row's answer in `turn`; problems: those of the rollout's first prompts."""
        said = rollout.completion_ids(turn)
        # the tokenizer takes an empty list for a single text
        texts = self.tokenizer.batch_decode(said) if said else []
        asked = [problems[index] for index in rollout.prompt_index.tolist()]
        workers = share_of_cores() if self.task.warm_up else 1
        rewards = torch.tensor(verify_batch(self.task.verify, texts, asked, workers)).float()
        answers = [self.task.answer(*pair) for pair in zip(texts, asked, strict=True)]
        return Verdicts((rewards == 1).float(), texts, answers, rewards)

    def tokens_after(self, config) -> int:
        """How many tokens may come after a first prompt, at most.

        config: anything with max_new_tokens, max_reflection_tokens (0: none) and attempts.
        """
        names = ("correct", "reflect", "retry", "critique", "rewrite")
        correct, reflect, retry, critique, rewrite = (len(self.seam(name)) for name in names)
        between = max(correct, retry)
        if config.max_reflection_tokens:
            between = max(correct, reflect + retry, critique + rewrite)
            between += config.max_reflection_tokens
        return config.max_new_tokens + (config.attempts - 1) * (between + config.max_new_tokens)
