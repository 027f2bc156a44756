"""The flags that scripts share."""

from dataclasses import dataclass

from loss import KL_KINDS
from training.command import (
    DATA,
    MACHINE,
    RUN,
    exit_on_bad_input,
    flag,
    parse_args,
    run_script,
)
from training.fitting import TOKENS, machines, papers, speaks_as_embedded, tasks_own

__all__ = ["RUN", "exit_on_bad_input", "flag", "parse_args", "run_script"]

OVERLONG_HELP = (
    "problems whose conversation might not fit the model's context: drop leaves them out and says "
    "how many, error stops"
)
LR_HELP = "peak learning rate of AdamW; with --lora_rank by default ten times as high"
KL_HELP = "KL estimator; loss.kl_terms says which gradient each one has"


@dataclass
class TaskConfig:
    """The flags that say what is to be done, and by which model."""

    model: str = flag("models/tiny", "model directory or hub name", group=DATA, free=True)
    base: str | None = flag(
        None,
        "where the base model of --model is, if that is a directory of adapters, and they do not "
        "know",
        group=DATA,
        free=True,
    )
    task: str = flag(
        "tiny",
        "tiny, countdown, math, gsm8k, mbpp, mbpp_r, humaneval, function_call, or a file of your "
        "own, FILE.py, as recipes/my_task.py",
        group=DATA,
    )
    data: str | None = flag(
        None,
        "problems: a file (JSONL, JSON, CSV, parquet; .gz too), hub:NAME[:CONFIG], or "
        "train=...,test=... with one of these each; default: the task's own. One file is split by "
        "a hash of its content, 80/10/10 (MBPP: by task_id, as published)",
        group=DATA,
        free=True,
    )
    overlong: str = flag("error", OVERLONG_HELP, group=DATA, choices=("drop", "error"))
    prompts: str | None = flag(
        None,
        "JSON file that replaces some of the task's prompts; tasks/base.py has their names",
        group=DATA,
    )
    shots: int | None = flag(
        None,
        "few-shot examples, from the train split (MBPP: from task_id 1 to 10); "
        "default: 3 for mbpp, else 0",
        group=DATA,
        least=0,
    )
    shots_file: str | None = flag(
        None,
        "take the examples from this file instead; a `response` in it is shown as it is",
        group=DATA,
    )
    verify_seconds: float = flag(
        10.0, "own tasks: seconds of a verdict, then it is counted as wrong", group=DATA, above=0
    )
    code_timeout: float = flag(
        5.0,
        "code tasks: seconds of processor time of a verdict, however busy the machine is; what "
        "sleeps ends 10 seconds later",
        group=DATA,
        above=0,
    )
    code_numpy: bool = flag(
        False,
        "code tasks: programs may import numpy besides the standard library; docs/data.md says "
        "what else they can't do",
        group=DATA,
    )
    unsafe: bool = flag(
        False,
        "run programs of code tasks even where the sandbox can't hold them: "
        "they can do what you can do",
        group=MACHINE,
    )
    cache_tokens: int | None = flag(
        None,
        "tokens that the sampler's cache may hold on a rank; a batch that needs more is sampled in "
        "parts, and is the same. Default: what a quarter of the device's memory holds",
        group=MACHINE,
        free=True,
    )
    dtype: str | None = flag(
        None,
        "what the models compute in; weights and optimiser are float32. Default: bfloat16 on GPUs",
        choices=("float32", "bfloat16"),
        group=MACHINE,
        free=True,
    )

    asked = frozenset()  # the flags that were given
    chosen = {}  # {flag: whose value it has}, of those that were chosen to fit the model

    @property
    def embedded(self) -> bool:
        """Whether --model speaks as models/tiny does."""
        return speaks_as_embedded(self.model, self.base)


@dataclass
class TrainConfig(TaskConfig):
    """The flags that every training script shares."""

    overlong: str = flag("drop", OVERLONG_HELP, group=DATA, choices=("drop", "error"))
    output_dir: str = flag("runs/run", "the run's directory: new, or to be resumed", group=RUN)
    resume: bool = flag(
        False,
        "go on with the run in --output_dir, with its flags; start it if there is none yet",
        group=RUN,
    )
    seed: int = flag(0, "seed of the problems' order and of every sample", group=RUN)
    preset: str | None = flag(
        None,
        "paper: the paper's values in place of defaults, those of another model among them; what "
        "it leaves open (samples a problem, how long each stage is) is ours",
        choices=("paper",),
    )
    max_new_tokens: int = flag(16, "token limit of an attempt", other=tasks_own("max_new_tokens"))
    temperature: float = flag(1.0, "sampling temperature while training")
    kl: str = flag("exact", KL_HELP, choices=KL_KINDS)
    lr: float = flag(1.5e-4, LR_HELP, other=papers(5e-6, code=1e-5))
    lora_rank: int | None = flag(
        None,
        "train adapters of this rank beside the linear layers (LoRA), and leave the weights as "
        "they are; default: train the weights",
    )
    lora_merged: bool = flag(
        False,
        "save checkpoints as ordinary models, merged, and not as adapters in PEFT's format (what "
        "is trained on top of other adapters is always merged)",
        group=RUN,
        free=True,
    )
    warmup: int = flag(10, "steps of linear warm-up", least=0)
    schedule: str = flag("constant", "after the warm-up", choices=("constant", "cosine"))
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm", above=0)
    epochs: int = flag(1, "updates a batch; above 1 the ratio pi / pi_old is clipped")
    clip: float = flag(0.2, "how far the ratio may move from 1 when epochs > 1", above=0, most=1)
    is_cap: float | None = flag(
        None,
        "weigh each sampled token by min(pi / pi_sampler, this cap), as sampler and scorer round "
        "differently; 0: no weights. Default: 2 where they compute in bfloat16, else 0",
    )
    token_budget: int | None = flag(
        TOKENS,
        "tokens of a micro-batch",
        group=MACHINE,
        free=True,
        other=machines("as many, or what fits a quarter of the memory"),
    )
    checkpointing: bool | None = flag(
        False,
        "compute the activations again in the backward pass: less memory, more time",
        group=MACHINE,
        free=True,
        other=machines("where they don't fit a quarter of the memory otherwise"),
    )
    compile: bool = flag(
        False,
        "torch.compile of the update, by a C++ compiler: half a minute at the start, then 0.88 of "
        "the time on a CPU; on GPUs not measured. docs/gpus.md says what of memory it changes",
        group=MACHINE,
        free=True,
    )
    hsdp: int = flag(
        1,
        "with torchrun: copies of the weights, each spread over its own ranks; "
        "one for each node, say",
        group=MACHINE,
        free=True,
    )
    cpu_offload: bool = flag(
        False,
        "weights and optimiser stay in the CPU's memory",
        group=MACHINE,
        free=True,
    )
    log: str | None = flag(
        None,
        "hands metrics on to tensorboard, wandb or trackio, or several of them, with commas",
        group=RUN,
        free=True,
    )
    max_skipped: int = flag(
        5,
        "training stops after so many steps in a row with a gradient that is not finite",
        group=RUN,
    )
    save_every: int = flag(
        20,
        "steps between saved states; the best checkpoint is chosen over such windows",
        group=RUN,
        free=True,
    )
    keep: int = flag(2, "saved states that are kept, the newest ones", group=RUN, free=True)
    skip_damaged: bool = flag(
        False,
        "with --resume: set damaged states aside and go on from the newest that is whole",
        group=RUN,
    )
    eval_every: int = flag(
        40,
        "steps between evaluations at T = 1 on validation; 0: only at the end",
        group=RUN,
        least=0,
    )
    eval_problems: int = flag(300, "validation problems of those evaluations", group=RUN)
    final_problems: int | None = flag(
        None, "validation problems of the final table; default: all", group=RUN
    )
    max_minutes: float | None = flag(
        None,
        "the run ends by itself after the step in which so many minutes are over, with a saved "
        "state and its best checkpoint; --resume goes on (what comes before the first step, probe "
        "and collection, is not cut short)",
        group=RUN,
        above=0,
    )
    probe: int = flag(
        64,
        "training problems tried first: where all fail or none, training stops; 0: no probe",
        group=RUN,
        least=0,
    )

    @property
    def rows_each(self) -> int:
        """Rows of one problem, which are sampled together."""
        return self.rows // self.problems

    # What follows has no annotation, and so is no flag.
    attempts = 2  # of an evaluation
    max_reflection_tokens = 0  # rrr.py alone has it as a flag
    passes = 4  # over the validation problems, for the final table: two models, two temperatures
    last_stage = 1  # in which the best checkpoint is looked for
    judged_by = "reward"  # the figure of a step by which it is
    # what the bar shows: {name: figure}, what matters most first
    shown = {"stage": "stage", "t1": "acc_t1", "t2": "acc_t2", "kl_t1": "kl_t1"}
