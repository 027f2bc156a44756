"""What a script needs before it can train or evaluate: a task, a sampler, prompts that fit, a try.

All bad input is a ValueError here, before any long work.
"""

from pathlib import Path

from report.figures import REWARDS
from sampler import Sampler
from sampling.turns import encode
from tasks.env import Env
from tasks.loading import load_task
from tasks.own import is_own
from tasks.sources import naming
from training import lora
from training.batches import pick_things
from training.distributed import on_first, rank, together
from training.fitting import fit_to_machine
from training.loggers import names_of
from training.models import check_flags, compute_dtype, fingerprint, load_model
from training.parts import check_cache
from training.progress import said_if_slow


def prepare(
    config, counts: dict[str, int | None], day: str | None = None
) -> tuple[Env, Sampler, dict[str, list]]:
    """(env, sampler, {split: problems}) by a script's flags.

    `counts` names the splits and how many problems of each to take (None: all).
    day: of the prompts (sampling/turns.py), the same on all ranks.
    """
    check_flags(config)
    on_first(names_of, config)
    task, splits = load_task(config, counts)
    with said_if_slow(f"loading {config.model} ..."):
        how = {"dtype": compute_dtype(config), "base": config.base}
        model, tokenizer = load_model(config.model, **how)
        sampler, env = Sampler(model, tokenizer), Env(task, tokenizer, day)
    fit_to_machine(config, model)
    require_end(env, sampler)
    chosen = {}
    for name, count in counts.items():
        with naming(name):
            if task.file:  # whose words may be none of the embedded model's
                said = task.prompt(splits[name][0])
                check_words(tokenizer, said if isinstance(said, str) else said[-1]["content"])
            chosen[name], said = with_room(env, sampler, splits[name], count, config)
        if said and rank() == 0:
            print(f"{name}: {said}")
    for name, problems in chosen.items():
        each = config.rows_each if name == "train" else 1  # others are sampled one by one
        check_cache(env, sampler, problems, config, each)
    return env, sampler, chosen


def sampler_of(scorer, sampler, env: Env, config, name: str) -> Sampler:
    """Of --model or of run/checkpoint (`name`), after or while training.

    Nothing is loaded that is there: adapters go onto the model that is sampled from, and a whole
    reference is the base. Only one that is spread over ranks (FSDP2) is read again.
    """
    adapted, path = scorer.adapters is not None, Path(name)
    if adapted and (name == config.model or lora.is_adapter(path)):
        found = Sampler(sampler.model, env.tokenizer)
        if name != config.model:
            own, _ = lora.read(path, sampler.model, fingerprint(sampler.model))
            found.adapters = own.to(sampler.model.dtype).requires_grad_(False)
        return found
    stage1 = getattr(config, "reference", "base") == "stage1"
    if name == config.model and scorer.reference is not None and not (stage1 or together()):
        return Sampler(scorer.reference, env.tokenizer)
    return load_sampler(name, env, config)


def load_sampler(name: str, env: Env, config, device=None) -> Sampler:
    """Of another model in the same conversations; ValueError if ids are other words to it.

    Or if it doesn't stop at the end of a turn. What is said between its turns is the env's; its own
    chat template counts for nothing.
    """
    model, tokenizer = load_model(name, device, compute_dtype(config), config.base)
    if tokenizer.get_vocab() != env.tokenizer.get_vocab():
        raise ValueError(
            f"{name} has another tokenizer than --model {config.model}, and would read other words "
            "in the same ids: take a model with the same vocabulary"
        )
    sampler = Sampler(model, env.tokenizer)
    require_end(env, sampler)
    return sampler


def prepare_reflector(config, env: Env, sampler, problems: list[dict]):
    """(sampler of --reflector, else the given one; the problems that fit its context too)."""
    if not config.reflector:
        return sampler, problems
    with naming(f"--reflector {config.reflector}"):
        sampler = load_sampler(config.reflector, env, config)
        problems, said = with_room(env, sampler, problems, None, config)
    if said and rank() == 0:
        print(f"--reflector: {said}")
    return sampler, problems


def require_end(env: Env, sampler) -> None:
    """ValueError if a turn of this chat can't end."""
    stop = env.seam("correct")[0]
    if not sampler.is_stop[stop]:
        end = env.tokenizer.decode([stop])
        raise ValueError(
            f"the chat template ends a turn with {end!r}, where the model does not stop: "
            "add it to its eos"
        )


def check_words(tokenizer, text: str) -> None:
    """ValueError if the model has no token for a word, as the embedded one for most."""
    none, pad = {tokenizer.unk_token_id, tokenizer.pad_token_id}, tokenizer.pad_token or "\0"
    for word in text.split():
        if none & {*encode(tokenizer, word)} and pad not in word:
            raise ValueError(f"the model has no word for {word!r}")


def with_room(env: Env, sampler, problems: list[dict], count: int | None, config):
    """(the first `count` problems that fit the model's context, what is said of those left out).

    ValueError if none fits, or with --overlong error if one does not.
    """
    if not problems:
        raise ValueError("no problem is left beside the few-shot examples: lower --shots")
    follows, kept, spoken = env.tokens_after(config), [], []
    for problem in problems:
        if len(kept) == count:
            break
        spoken.append(len(env.prompts([problem])[0]) + len(env.given_ids(problem)))
        if config.overlong == "error" or spoken[-1] + follows <= sampler.limit:
            kept.append(problem)
    longest = max(spoken)
    if longest + follows <= sampler.limit:
        return kept, ""
    fault = (
        f"a prompt of {longest} tokens and up to {follows} after it don't fit the model's context "
        f"of {sampler.limit}"
    )
    remedy = "lower --shots or the token limits"
    if not kept:
        raise ValueError(f"all {len(spoken):,} problems are too long: {fault}: {remedy}")
    if config.overlong == "error":
        where = spoken.index(longest) + 1
        raise ValueError(f"problem {where}: {fault}: {remedy}, or leave it out (--overlong drop)")
    out = f"{len(spoken) - len(kept):,} of {len(spoken):,} problems left out"
    return kept, f"{out}: {fault} (--overlong error stops instead)"


def probe(look, problems: list[dict], config, keys=("acc_t1", "acc_t2")) -> None:
    """ValueError if --probe problems are all right or all wrong: there is nothing to learn from.

    look: (problems, temperature, name of the phase) -> (figures, conversations), of the model that
    is to be trained.
    keys: the figures that training would reward.
    """
    if not config.probe:
        return
    chosen = pick_things(problems, config.seed, 0, min(config.probe, len(problems)))
    figures, _ = look(chosen, config.temperature, "probe")
    rates = {key: figures.get(key, 1.0) for key in keys}  # no failure: there is nothing to retry
    if rank() == 0:
        seen = rates | {name: figures[name] for name in REWARDS if name in figures}
        said = ", ".join(f"{name} {rate:.1%}" for name, rate in seen.items())
        print(f"probe   of {len(chosen)} problems at T = {config.temperature:g}: {said}")
    if any(figures.get(f"{name}_se") for name in REWARDS):  # parts of rewards differ
        return
    if {*rates.values()} in ({0.0}, {1.0}):
        shown = ", ".join(f"{key} {rate:.0%}" for key, rate in rates.items())
        harder = "harder data"
        shots = "" if is_own(config.task) else "--shots 3, "
        easier = f"{shots}easier data, more --max_new_tokens or a bigger model"
        raise ValueError(
            f"no signal: of {len(chosen)} training problems at T = {config.temperature:g}, {shown} "
            f"({figures['truncated']:.0%} of answers cut off). Try "
            f"{easier if 0.0 in rates.values() else harder}"
            "; or train all the same with --probe 0"
        )
