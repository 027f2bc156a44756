"""The command-line flags that scripts share, and how bad input is said.

That is one line, exit code 2, before any long work.
"""

import os
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from loss import KL_KINDS


def flag(default, text: str, **more):
    """A dataclass field that is a command-line flag with a help line."""
    return field(default=default, metadata={"help": text, **more})


OVERLONG_HELP = (
    "problems whose conversation might not fit the model's context: drop leaves them out and says "
    "how many, error stops"
)
KL_HELP = "KL estimator; loss.kl_terms says which gradient each one has"


@dataclass
class TaskConfig:
    """The flags that say what is to be done, and by which model."""

    model: str = flag("models/tiny", "model directory or hub name")
    task: str = flag(
        "tiny", "tiny, countdown, math, gsm8k, mbpp, mbpp_r, humaneval or function_call"
    )
    data: str | None = flag(
        None,
        "problems: a file (JSONL, JSON, CSV, parquet; .gz too), hub:NAME[:CONFIG], or "
        "train=...,test=... with one of these each; default: the task's own. One file is split by "
        "a hash of its content, 80/10/10 (MBPP: by task_id, as published)",
    )
    overlong: str = flag("error", OVERLONG_HELP, choices=("drop", "error"))
    prompts: str | None = flag(
        None, "JSON file that replaces some of the task's prompts; tasks/base.py has their names"
    )
    shots: int | None = flag(
        None,
        "few-shot examples, from the train split (MBPP: from task_id 1 to 10); "
        "default: 3 for mbpp, else 0",
    )
    shots_file: str | None = flag(
        None, "take the examples from this file instead; a `response` in it is shown as it is"
    )
    code_timeout: float = flag(
        5.0,
        "code tasks: seconds of processor time of a verdict, however busy the machine is; what "
        "sleeps ends 10 seconds later",
    )
    code_numpy: bool = flag(
        False,
        "code tasks: programs may import numpy besides the standard library; docs/data.md says "
        "what else they can't do",
    )
    unsafe: bool = flag(
        False,
        "run programs of code tasks even where the sandbox can't hold them: "
        "they can do what you can do",
    )
    dtype: str | None = flag(
        None,
        "with torchrun: what the models compute in; weights and optimiser are float32. "
        "Default: bfloat16 on GPUs",
        choices=("float32", "bfloat16"),
    )


@dataclass
class TrainConfig(TaskConfig):
    """The flags that every training script shares."""

    overlong: str = flag("drop", OVERLONG_HELP, choices=("drop", "error"))
    output_dir: str = flag("runs/run", "the run's directory: new, or to be resumed")
    resume: bool = flag(False, "go on with the run in --output_dir")
    seed: int = flag(0, "seed of the problems' order and of every sample")
    max_new_tokens: int = flag(16, "token limit of an attempt")
    temperature: float = flag(1.0, "sampling temperature while training")
    kl: str = flag("exact", KL_HELP, choices=KL_KINDS)
    lr: float = flag(1.5e-4, "peak learning rate of AdamW")
    warmup: int = flag(10, "steps of linear warm-up")
    schedule: str = flag("constant", "after the warm-up", choices=("constant", "cosine"))
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm")
    epochs: int = flag(1, "updates a batch; above 1 the ratio pi / pi_old is clipped")
    clip: float = flag(0.2, "how far the ratio may move from 1 when epochs > 1")
    token_budget: int = flag(16384, "tokens of a micro-batch")
    checkpointing: bool = flag(
        False, "compute the activations again in the backward pass: less memory, more time"
    )
    hsdp: int = flag(
        1,
        "with torchrun: copies of the weights, each spread over its own ranks; "
        "one for each node, say",
    )
    cpu_offload: bool = flag(False, "with torchrun: weights and optimiser stay in the CPU's memory")
    max_skipped: int = flag(
        5, "training stops after so many steps in a row with a gradient that is not finite"
    )
    save_every: int = flag(
        20, "steps between saved states; the best checkpoint is chosen over such windows"
    )
    keep: int = flag(2, "saved states that are kept, the newest ones")
    skip_damaged: bool = flag(
        False, "with --resume: set damaged states aside and go on from the newest that is whole"
    )
    eval_every: int = flag(
        40, "steps between evaluations at T = 1 on validation; 0: only at the end"
    )
    eval_problems: int = flag(300, "validation problems of those evaluations")
    final_problems: int | None = flag(None, "validation problems of the final table; default: all")
    probe: int = flag(
        64, "training problems tried first: where all fail or none, training stops; 0: no probe"
    )

    # What follows has no annotation, and so is no flag.
    attempts = 2  # of an evaluation
    max_reflection_tokens = 0  # rrr.py alone has it as a flag
    last_stage = 1  # in which the best checkpoint is looked for
    judged_by = "reward"  # the figure of a step by which it is


def first_of_node() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextmanager
def exit_on_bad_input():
    """Around a script's preparations: a ValueError is the user's to mend: one line, exit code 2."""
    try:
        yield
    except ValueError as error:
        if first_of_node():
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def parse_args(config_class, args: list[str] | None = None):
    """The dataclass, filled from the command line; what does not parse is one line, exit code 2."""
    parser = HfArgumentParser(config_class)

    def error(message: str):
        parser.exit(2, f"{parser.prog}: error: {message}\n" if first_of_node() else None)

    parser.error = error
    config, unknown = parser.parse_args_into_dataclasses(args, return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown flag {unknown[0]}: see --help")
    return config


def check_counts(config, *may_be_zero: str) -> None:
    """Every whole number among the flags must be at least 1, or 0 where that means something."""
    zero = {*may_be_zero, "seed", "warmup", "eval_every", "shots", "probe"}
    for name, value in asdict(config).items():
        least = 0 if name in zero else 1
        if type(value) is int and value < least:
            raise ValueError(f"--{name} {value}: must be at least {least}")
