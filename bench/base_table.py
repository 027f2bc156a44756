"""The base table: what a model's second attempts are worth before any training.

    python bench/base_table.py --model DIR --task mbpp --data mbpp.jsonl --limit 100

Greedy and at T = 1, self-correction and reflect-and-retry go on from the same first attempts. A
task's file at one temperature in --results keeps the values of every conversation and three of them
word for word; whatever is there is gone on from, by the next call, here or elsewhere: after Ctrl-C,
with a larger --limit, for another task or model. table.md beside them has the figures of all.
`base_table.sh` has the calls.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluate import MODES, pieces  # noqa: E402
from report.figures import COLUMNS, summarize  # noqa: E402
from report.tables import format_table  # noqa: E402
from tasks.files import parse_json, read_text  # noqa: E402
from tasks.sources import content_hash  # noqa: E402
from training import distributed  # noqa: E402
from training.announce import machine  # noqa: E402
from training.checkpoint import write_text  # noqa: E402
from training.fitting import tasks_own  # noqa: E402
from training.flags import TaskConfig, exit_on_bad_input, flag, run_script  # noqa: E402
from training.methods import Protocol  # noqa: E402
from training.run import contents_of, time_is_up  # noqa: E402
from training.setup import prepare  # noqa: E402

METHODS = ("self_correct", "reflect_retry")
SHOWN = 3  # conversations of each method in a file
FIGURES = tuple(name for name in COLUMNS if name != "edit_ratio")
FIGURES += ("truncated", "retry_given_failure", "well_formed_retry")


@dataclass
class Config(TaskConfig):
    name: str | None = flag(None, "what the table calls the model; default: its directory's name")
    limit: int = flag(100, "test problems, those that are there already among them", least=1)
    held_out: int | None = flag(
        None,
        "only of the so many test problems with the lowest hashes of their contents, which the "
        "recipes hold out of function calls: 200",
        least=1,
    )
    piece: int = flag(16, "problems between two times that a file is written", least=1)
    max_minutes: float | None = flag(None, "stop after so long, between two pieces")
    max_new_tokens: int = flag(16, "token limit of an attempt", other=tasks_own("max_new_tokens"))
    max_reflection_tokens: int = flag(
        72, "token limit of a reflection", other=tasks_own("max_reflection_tokens")
    )
    results: str = flag("results/base", "directory of the table and its files")

    own_flags = "table"  # their heading in --help
    attempts, rows_each, seed = 2, 1, 0


def prepared(config: Config):
    """(env, sampler, test problems, what their figures depend on); bad input is a ValueError."""
    env, sampler, splits = prepare(config, {"test": None})
    problems = splits["test"]
    if config.held_out:
        problems = lowest(env.task, problems, config.held_out)
    limits = [config.max_new_tokens, config.max_reflection_tokens]
    made_of = contents_of(env, sampler.model, {"problems": problems}) | {"token limits": limits}
    return env, sampler, problems, made_of


def lowest(task, problems: list[dict], count: int) -> list[dict]:
    """As recipes/time_box.sh holds out, by hash, so that the first few are of all kinds."""
    by_hash = {content_hash(task.key(problem)): problem for problem in problems}
    if len(by_hash) < count:
        raise ValueError(f"--held_out {count}: there are {len(by_hash)} problems")
    return [by_hash[key] for key in sorted(by_hash)[:count]]


def read_cell(path: Path, made_of: dict) -> dict:
    """What a file has, or a new one's contents; ValueError if it was made of something else."""
    if not path.exists():
        return {"made_of": made_of, "made_on": [], "values": {}, "conversations": {}}
    cell = parse_json(read_text(str(path)), str(path))
    changed = [key for key in made_of if cell["made_of"].get(key) != made_of[key]]
    if changed:
        other = ", ".join(key.removeprefix("the ") for key in changed)
        raise ValueError(f"{path} was made with other {other}: delete it, or name other --results")
    return cell


def rows_of(columns: dict[str, list]) -> list[dict]:
    """The values of each conversation; one that ended early lacks those of a reflection."""
    rows = zip(*columns.values(), strict=True)
    return [{k: v for k, v in zip(columns, row, strict=True) if v is not None} for row in rows]


def add(cell: dict, new: dict[str, list[dict]], where: str) -> None:
    """Puts new conversations of each method into a cell."""
    cell["made_on"] += [where] * (where not in cell["made_on"])
    for method, talks in new.items():
        rows = rows_of(cell["values"].get(method, {})) + [talk["values"] for talk in talks]
        names = dict.fromkeys(name for row in rows for name in row)
        short = {name: [row.get(name) for row in rows] for name in names}
        short["edit_ratio"] = [round(ratio, 4) for ratio in short["edit_ratio"]]
        cell["values"][method] = short
        shown = cell["conversations"].setdefault(method, [])
        shown += [{k: talk[k] for k in ("problem", "attempts", "said")} for talk in talks]
        del shown[SHOWN:]


def go_on(config: Config, env, sampler, problems, temperature: float, path: Path, cell: dict):
    """A cell's missing problems, in pieces, until the time is up."""
    limits = (config.max_new_tokens, config.max_reflection_tokens)
    protocol = Protocol(METHODS[0], temperature, *limits, cache_tokens=config.cache_tokens)
    ways = {method: ((sampler, sampler, sampler), method) for method in METHODS}
    done = len(next(iter(cell["values"].get(METHODS[0], {"": []}).values())))
    for start in range(done, len(problems), config.piece):
        if time_is_up(config):
            return
        for new in pieces(ways, env, problems[: start + config.piece], protocol, start, path.stem):
            add(cell, new, machine(sampler.model))
        write_text(path, json.dumps(cell) + "\n")


def table(results: Path) -> str:
    """Markdown, in per cent, of all files there."""
    found = {}
    for path in sorted(results.glob("*_*_*.json")):
        name, mode = path.stem.rsplit("_", 1)
        for method, columns in json.loads(path.read_text())["values"].items():
            figures = summarize([{"values": row} for row in rows_of(columns)])
            found.setdefault(f"{name}, {method}, n = {figures['n']}", {})[mode] = figures
    return format_table(found, FIGURES)


def main(config: Config) -> None:
    distributed.start(config)
    results, name = Path(config.results), config.name or Path(config.model).name
    with exit_on_bad_input():
        if "/" in name:
            raise ValueError(f"--name {name}: it becomes part of a file's name")
        env, sampler, problems, made_of = prepared(config)
        results.mkdir(parents=True, exist_ok=True)
        paths = {mode: results / f"{name}_{config.task}_{mode}.json" for mode in MODES}
        cells = {mode: read_cell(path, made_of) for mode, path in paths.items()}
    for mode, T in MODES.items():
        go_on(config, env, sampler, problems[: config.limit], T, paths[mode], cells[mode])
    text = table(results)
    write_text(results / "table.md", text + "\n")
    print(text)
    distributed.finish()


if __name__ == "__main__":
    run_script(main, Config)
