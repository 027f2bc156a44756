"""Evaluation of several attempts: `python evaluate.py --model DIR --task NAME --method METHOD`.

The model answers, then answers again; --method says what comes between (training/methods.py). All
figures are the verifier's verdicts, never a shaped reward; report/figures.py says what each one is.
As a library it is what the training scripts look at their models with (`Exam`).
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from report.curves import plot_curves
from report.figures import COLUMNS, reward_of, summarize, votes
from report.page import SHOWN, keep
from report.tables import format_table, format_transcripts, format_votes
from sampling.turns import today
from tasks.sources import SPLITS
from training import checkpoint, distributed, partial
from training.announce import chosen, machine, parameters
from training.batches import row_seeds
from training.card import write_card
from training.controls import MODES, models_of
from training.distributed import exchange, on_first, share, world
from training.fitting import tasks_own
from training.flags import TaskConfig, exit_on_bad_input, flag, run_script
from training.loop import Hooks
from training.methods import AFTER_ANY, METHODS, Protocol, converse
from training.pages import prepare_reference, write_talks
from training.parts import cache_tokens, longest, tokens_of
from training.progress import about, bar, counted
from training.run import saving, stop, time_is_up
from training.setup import prepare, prepare_reflector

CACHE_TOKENS = 2**16  # of the conversations that are held in memory together
MOMENT = 1.0  # seconds that an evaluation may take without a word
WATCHED = ("acc_t1", "acc_t2", "delta", "i_to_c", "c_to_i", "well_formed")
HELP = "; ".join(f"{name}: {text}" for name, text in METHODS.items())


@dataclass
class Config(TaskConfig):
    split: str = flag("validation", "train, validation or test (for final tables only)")
    limit: int | None = flag(None, "only the first so many problems")
    temperature: float = flag(0.0, "0 is greedy")
    samples: int = flag(1, "conversations a problem, at a temperature above 0")
    method: str = flag("self_correct", HELP, choices=tuple(METHODS))
    attempts: int = flag(2, "attempts a conversation, the first included")
    reflector: str | None = flag(None, "model that writes the reflections; default: --model")
    max_new_tokens: int = flag(16, "token limit of an attempt", other=tasks_own("max_new_tokens"))
    max_reflection_tokens: int = flag(
        72,
        "token limit of a reflection or critique",
        other=tasks_own("max_reflection_tokens"),
    )
    seed: int = flag(0, "seed of the sampling")
    output: str | None = flag(
        None,
        "new JSON file for the figures and conversations; an evaluation that was stopped goes on "
        "where it was",
    )
    html: str | None = flag(None, "new HTML file, a page of the conversations, token by token")
    reference: str | None = flag(
        None,
        "model whose log-probs --html compares with, or none; default: the one that the run began "
        "with whose checkpoint --model is, if it is one",
    )

    own_flags = "evaluation"  # their heading in --help

    @property
    def rows_each(self) -> int:
        return self.samples

    @property
    def ids(self) -> bool:
        return bool(self.html)


def evaluate(
    cast, env, problems, protocol, done=(), keep=None, what=None
) -> tuple[dict, list[dict]]:
    """(figures, conversations) of some attempts at every problem.

    cast: one sampler, or the three that attempt, reflect and retry. done: conversations that are
    there already. keep: called with every piece of new ones.
    """
    cast = cast if isinstance(cast, tuple) else (cast, cast, cast)
    samples, talks = protocol.samples, list(done)
    ways = {"": (cast, protocol.method)}
    for new in pieces(ways, env, problems, protocol, len(talks) // samples, what or "evaluation"):
        if keep:
            keep(new[""])
        talks += new[""]
    figures = summarize(talks, samples)
    return figures | (votes(talks, samples) if samples > 1 else {}), talks


def pieces(ways, env, problems, protocol, first: int, what: str) -> Iterator[dict]:
    """{way: conversations} of a piece of the problems after another, from the `first` on.

    ways: {name: (cast, method)}, of which all have the same sampler attempt first; what: it is, for
    the bar. Ranks share the problems of a piece, and all get all conversations.
    """
    samples, samplers = protocol.samples, [sampler for cast, _ in ways.values() for sampler in cast]
    # several ways keep the first attempts beside their own rows
    room = min(cache_tokens(protocol, sampler) for sampler in samplers) // min(len(ways), 2)
    tokens = tokens_of(samplers[0], samples, longest(env, problems, protocol))  # of a problem
    piece = max(1, min(CACHE_TOKENS, room) // tokens) * world()  # problems
    each = samples * len(ways)  # conversations a problem
    shown = {"total": each * len(problems), "first": each * first, "leave": False}
    with bar(what, **shown, delay=MOMENT) as progress, counted(progress, *samplers):
        for start in range(first, len(problems), piece):
            count = min(piece, len(problems) - start)
            part = share(count)
            span = range(start + part.start, start + part.stop)  # this rank's
            seeds = row_seeds(span, "evaluate", protocol.seed, each=samples)
            mine = problems[span.start : span.stop]
            protocol = protocol._replace(ids=protocol.ids and start * samples < SHOWN)
            parts = exchange(converse(ways, env, mine, seeds, protocol) if mine else {})
            progress.update(each * count)
            yield {name: [talk for part in parts for talk in part.get(name, ())] for name in ways}


@dataclass
class Exam:
    """How a training script looks at its models: `evaluate` by the limits of its flags."""

    env: object
    config: object
    method: str
    tried: int = 0  # conversations so far, but for those of the final table,
    seconds: float = 0.0  # and how long they took

    def __call__(self, cast, problems, temperature: float, what="validation"):
        """(figures, conversations); what: it is, for the bar."""
        started = time.perf_counter()
        found = evaluate(cast, self.env, problems, self.protocol(temperature), what=what)
        self.seconds += time.perf_counter() - started
        self.tried += len(problems)
        return found

    def pace(self) -> float | None:
        """Seconds a conversation; None before the first."""
        return self.seconds / self.tried if self.tried else None

    def protocol(self, temperature: float) -> Protocol:
        config = self.config
        limits = (config.max_new_tokens, config.max_reflection_tokens, config.attempts)
        return Protocol(self.method, temperature, *limits, cache_tokens=config.cache_tokens)

    def hooks(self, step_batch, sampler, problems, keys=WATCHED) -> Hooks:
        """What a training script hands to its loop, with an algorithm's `step_batch`."""
        run = Path(self.config.output_dir)

        def look(step: int, batch, scores) -> None:
            keep(run, self.about, self.env.tokenizer, step, batch, scores)

        return Hooks(step_batch, self.watcher(sampler, problems, keys), plot_curves, look)

    @property
    def about(self) -> str:
        """The run, at the head of its page."""
        when = "of the first step, of those that are evaluated, and of the last"
        return f"{self.config.model}, {self.config.task}; some rollouts {when}"

    def watcher(self, sampler, problems, keys=WATCHED):
        """For the training loop: step -> (figures, a few conversations as text).

        Figures `eval_*` are at T = 1, on the first `eval_problems`.
        """
        some = problems[: self.config.eval_problems]

        def evaluate_now(step: int) -> tuple[dict, str]:
            figures, talks = self(sampler, some, 1.0)
            text = f"step {step + 1}\n{format_transcripts(talks)}\n\n"
            return {f"eval_{key}": figures[key] for key in keys if key in figures}, text

        return evaluate_now

    @contextmanager
    def final_table(self, run: Path, problems, count: int):
        """A function (name, mode, ways) -> {way: conversations}, for the passes of a run's table.

        Every piece is kept in the run's directory, where a run that was stopped goes on. count: of
        all ways of all passes.
        """
        with partial.interrupted(partial.table_of(run), "go on with --resume"):
            with saving(run):
                there = on_first(partial.open_table, run)
            done = sum(len(talks) for row in there for talks in row["talks"].values())
            self.announce(count * len(problems), done)

            def try_all(name: str, mode: str, ways: dict[str, tuple]) -> dict[str, list]:
                key = [name, mode, *ways]
                rows = [row["talks"] for row in there if row["pass"] == key]
                first = sum(len([*row.values()][0]) for row in rows)
                how = self.protocol(MODES[mode]), first, f"{name}, {mode}"
                for new in pieces(ways, self.env, problems, *how):
                    with saving(run):
                        on_first(partial.add, partial.table_of(run), [{"pass": key, "talks": new}])
                    rows.append(new)
                    if time_is_up(self.config):
                        stop(
                            "the time is up, and all steps are done: the final table goes on "
                            "with --resume",
                            code=0,
                        )
                return {way: [talk for row in rows for talk in row[way]] for way in ways}

            yield try_all

    def announce(self, count: int, done: int) -> None:
        said, pace = f"now the final table: {count:,} conversations", self.pace()
        said += f", of which {done:,} are there" if done else ""
        said += f", {about((count - done) * pace)}" if pace else ""
        print(said)

    def before_and_after(self, run: Path, problems, find) -> dict:
        """Figures of the base and of the trained model; find: a model's name -> its sampler."""

        def both_modes(name: str, path: str) -> dict:
            ways = {name: ((find(path),) * 3, self.method)}
            return {mode: summarize(try_all(name, mode, ways)[name]) for mode in MODES}

        with self.final_table(run, problems, 2 * len(MODES)) as try_all:
            return {name: both_modes(name, path) for name, path in models_of(self.config, run)}


def conclude(config, results: dict, count: int, columns=COLUMNS) -> None:
    """A run's end: its tables, and results.json, which says that the run is complete."""
    run, text = Path(config.output_dir), json.dumps(results, indent=2) + "\n"
    models = {name: modes for name, modes in results.items() if name != "controls"}
    table = f"{count} validation problems:\n\n{format_table(models, columns)}"
    with saving(run):
        on_first(write_card, config, run / "checkpoint", table)
        on_first(checkpoint.write_text, run / "results.json", text)
        on_first(partial.table_of(run).unlink, True)  # there may be none
    print(f"\n{table}")
    if "controls" in results:
        columns = ("retry_given_failure", "well_formed_retry")
        print(f"\nAfter the base model's failures:\n\n{format_table(results['controls'], columns)}")
    print(f"\nrun: {run}, with curves.png and rollouts.html")


def check(config: Config) -> None:
    if config.split not in SPLITS:
        raise ValueError(f"--split {config.split}: choose one of {', '.join(SPLITS)}")
    if config.samples > 1 and not config.temperature:
        raise ValueError(
            f"--samples {config.samples} would all be the same: give a --temperature above 0"
        )
    if (
        config.html
        and config.output
        and Path(config.html).absolute() == Path(config.output).absolute()
    ):
        raise ValueError(f"--html and --output are both {config.html}: name two files")
    if config.output:
        on_first(partial.check_new, "--output", config.output, ".partial")
    if config.html:
        on_first(partial.check_page, config)
    if config.reference and not config.html:
        raise ValueError("--reference is for --html, which says what tokens got of it: give that")


def describe(config: Config, model, problems: list[dict], done: int) -> None:
    said = f"{config.model}: {parameters(model):,} parameters, {machine(model)}; {config.task}, "
    said += f"{len(problems):,} {config.split} problems, {config.method}"
    said += f"; {chosen(config)}" if config.chosen else ""
    print(said + (f"; goes on after {done:,} conversations" if done else ""))


def evaluate_by(config: Config, path: Path | None) -> tuple[dict, list[dict], str]:
    """(figures, conversations, what is wrong with their page, if anything) by the flags.

    Conversations are kept in `path`, and those there gone on from. Bad input ends it.
    """
    with exit_on_bad_input():
        check(config)
        left = on_first(partial.left_over, path) if path else []
        day = left[0].get("day") if left else None
        day = day or on_first(today)  # of the first rank, around midnight too
        env, sampler, splits = prepare(config, {config.split: config.limit}, day)
        reflector, problems = prepare_reflector(config, env, sampler, splits[config.split])
        reference = prepare_reference(config, env) if config.html else None
        cast, done = (sampler, reflector, sampler), []
        if path:
            with partial.keeping(config.output):
                done = on_first(partial.open_output, config, cast, env, problems, left)

    def add(new: list[dict]) -> None:
        if path:
            with partial.keeping(config.output):
                on_first(partial.add, path, new)

    describe(config, sampler.model, problems, len(done))
    protocol = Protocol(**{name: getattr(config, name) for name in Protocol._fields})
    figures, talks = evaluate(cast, env, problems, protocol, done, add)
    if reference is not None:  # which takes their place
        for model in {part.model for part in cast}:
            distributed.drop_weights(model)
        reference.to(distributed.device())
    fault = on_first(write_talks, config, env, talks, reference) if config.html else ""
    return figures, talks, fault


def report(config: Config, figures: dict, talks: list[dict]) -> None:
    print(format_transcripts(talks))
    print(f"{figures['n']} {config.split} problems\n")
    names = tuple(f"acc_t{t}" for t in range(3, config.attempts + 1))
    if config.method not in AFTER_ANY:
        names += ("retry_given_failure", "well_formed_retry")
    modes = {"sampled" if config.temperature else "greedy": figures}
    print(format_table({config.model: modes}, COLUMNS + names))
    if config.temperature:
        print(f"\n{signal_in(talks)}")
    if config.samples > 1:
        print(f"\nMajority votes:\n\n{format_votes(figures)}")


def signal_in(talks: list[dict]) -> str:
    """Whether training would find something to reward."""
    rewards = [[reward_of(y) for y in talk["attempts"]] for talk in talks]
    said = f"{sum(map(any, rewards))} of {len(talks)} conversations have a reward above 0"
    if len({reward for turns in rewards for reward in turns}) == 1:
        return f"{said}: all are the same, and nothing is learnt from them."
    return f"{said}. Training learns where they differ among answers to the same problem."


def main(config: Config) -> None:
    distributed.start(config)
    path = partial.path_of(config.output) if config.output else None
    with partial.interrupted(path, "the same call goes on from there"):
        figures, talks, fault = evaluate_by(config, path)
        if path and not fault:
            slim = [{k: v for k, v in talk.items() if k != "contexts"} for talk in talks]
            with partial.keeping(config.output):
                whole = figures | {"conversations": slim}
                on_first(partial.finish_output, config.output, whole)
        report(config, figures, talks)
        if fault:
            stop(fault + (f"; what is done is in {path}, the same call goes on" if path else ""))
    distributed.finish()


if __name__ == "__main__":
    run_script(main, Config)
