"""What an algorithm needs to know of a task. Each task has a file of its own beside this one."""

import re
from collections.abc import Callable
from dataclasses import dataclass

PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
FOLLOW_UPS = ("correct", "reflect", "retry", "critique", "rewrite", "generic_reflection")
PROMPTS = ("system", "first", *FOLLOW_UPS)


@dataclass(frozen=True, kw_only=True)
class Task:
    """Problems, what is said to the model in each turn, and the verdict.

    A problem is a dict that can be written as JSON: it is kept in files of failures and of
    conversations. It has what the prompt, the verdict and a few-shot example need.

    What is said (a file of --prompts replaces any of these):
    system:    stands before all; empty: what the chat template puts there, if anything
    first:     the problem. {placeholders} stand for its parts, other braces for themselves;
               the other texts have no placeholders
    correct:   asks for a second attempt and never reveals a verdict (SCoRe, turn 2)
    reflect:   after a failure, asks what went wrong (RRR), and
    retry:     asks for another attempt after the reflection
    critique:  asks for a critique of any answer, and
    rewrite:   for a better answer after it (Self-Refine)
    generic_reflection: a reflection in the model's own name that knows nothing of the problem,
               for a control
    view:      the placeholders of `first`: {name: problem -> text}
    messages:  problem -> a text, or messages {role, content}, in place of `first`

    The verdict, which never raises on any response:
    answer:    (response, problem) -> the answer in it, or None if it is not well-formed; asked of
               every response in training too, so it should take no time
    verify:    (response, problem) -> is the answer right; or a reward from 0.0 to 1.0, which
               alone is right
    warm_up:   a verdict whose processes are started, or fail, before a run; None: needs none

    The problems:
    parse:     row of data -> problem, or a ValueError that names the field; None: takes no data
    ask:       a person's question -> a problem that it states in full, or None (talk.py)
    generate:  (split, seed) -> problems; None: there are none without data, and `source` says
               where to get some
    key:       problem -> the text that tells it from others; its hash decides the split
    published: problem -> its split, where the publisher has fixed one
    given:     problem -> a first attempt that the data gives, in place of one that the model makes
    solution:  problem -> a good response, or None if the data has none; for few-shot examples
    shots:     (user's message, good answer) of the few-shot examples before the first prompt; by
               default the first `default_shots` there are

    How long a chat model may need (--max_new_tokens and --max_reflection_tokens are these, unless
    given, for any model but the embedded one):
    max_new_tokens, max_reflection_tokens
    """

    name: str

    system: str = ""
    first: str
    correct: str
    reflect: str
    retry: str
    critique: str
    rewrite: str
    generic_reflection: str = "I made a mistake. Next time I will check every step before I answer."
    view: dict[str, Callable[[dict], str]]
    messages: Callable[[dict], str | list[dict]] | None = None

    answer: Callable[[str, dict], str | None]
    verify: Callable[[str, dict], bool | float]
    warm_up: Callable[[], bool] | None = None

    parse: Callable[[dict], dict] | None = None
    ask: Callable[[str], dict | None] | None = None
    generate: Callable[[str, int], list[dict]] | None = None
    source: str = ""
    key: Callable[[dict], str]
    published: Callable[[dict], str] | None = None
    given: Callable[[dict], str] | None = None
    solution: Callable[[dict], str | None]
    default_shots: int = 0
    shots: tuple[tuple[str, str], ...] = ()

    max_new_tokens: int = 512
    max_reflection_tokens: int = 256

    file: str = ""  # what stands in the file of a task of the user's own

    def prompt(self, problem: dict) -> str | list[dict]:
        """The first user message, or all messages up to it."""
        return self.messages(problem) if self.messages else fill(self.first, problem, self.view)


def fill(template: str, problem: dict, view: dict[str, Callable[[dict], str]]) -> str:
    """Each {placeholder} replaced by what `view` makes of the problem."""
    return PLACEHOLDER.sub(lambda match: view[match[1]](problem), template)
