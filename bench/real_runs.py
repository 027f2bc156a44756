"""What runs of recipes/gpu_score_calls.sh made of a real model: kept small, and as a table.

    python bench/real_runs.py --add score=runs/gpu_calls_score,plain=runs/gpu_calls_plain
    python bench/real_runs.py

--add keeps of such a run, in --results/NAME: flags, metrics and curves, and of every evaluation on
held-out problems each conversation's values, and SHOWN of them word for word. Both make table.md
of all that is there. Beside evaluate's figures: `gain_t1`, `gain_t2`, over the base model's on the
same problems; `fresh`, where there are several samples of a problem: where a first attempt is
wrong, how often another first attempt at the problem is right. Second attempts that repair no more
than this are no better than to draw again.
"""

import json
import shutil
import sys
from dataclasses import dataclass
from itertools import groupby, permutations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from report.figures import COLUMNS, summarize  # noqa: E402
from report.tables import format_table  # noqa: E402
from tasks.sources import naming  # noqa: E402
from training.checkpoint import write_text  # noqa: E402
from training.flags import exit_on_bad_input, flag, run_script  # noqa: E402

SHOWN = 8  # problems, whose first conversation is kept
FIGURES = (*COLUMNS, "retry_given_failure", "fresh", "gain_t1", "gain_t2")
FILES = ("config.json", "metrics.jsonl", "curves.png")


@dataclass
class Config:
    add: str | None = flag(None, "NAME=OUT,... of runs to be kept")
    results: str = flag("results/real", "directory of what is kept")


def keep(name: str, out: Path, results: Path) -> None:
    """ValueError if `out` is no run that has been evaluated, or another one has the name."""
    run, kept = out / "run", results / name
    if kept.exists():
        raise ValueError(f"{kept} exists: delete it, or choose another name")
    if not all((run / file).exists() for file in FILES):
        raise ValueError("no run of recipes/gpu_score_calls.sh")
    cells = {path.name: json.dumps(cell_of(path)) + "\n" for path in out.glob("eval/*_*.json")}
    if not cells:
        raise ValueError("it has not been evaluated")
    flags = json.loads((run / "config.json").read_text())
    flags = {k: v for k, v in flags.items() if k not in ("model", "base", "data")}  # paths
    kept.mkdir(parents=True)
    for file in ("metrics.jsonl", "curves.png"):
        shutil.copy(run / file, kept)
    for file, text in (cells | {"config.json": json.dumps(flags, indent=2) + "\n"}).items():
        write_text(kept / file, text)


def cell_of(path: Path) -> dict:
    """Of an evaluation; ValueError if the base model's on the same problems is not beside it."""
    base = path.with_name(f"base_{path.stem.rpartition('_')[2]}.json")
    if not base.exists():
        raise ValueError(f"{base.name} is missing: call the recipe again")
    talks, of_base = (json.loads(p.read_text())["conversations"] for p in (path, base))
    if [talk["problem"] for talk in talks] != [talk["problem"] for talk in of_base]:
        raise ValueError(f"{path.name} and {base.name} are of other problems")
    return kept_of(talks)


def kept_of(talks: list[dict]) -> dict:
    """samples: conversations of each problem, one after another."""
    runs = [len([*same]) for _, same in groupby(talks, lambda talk: talk["problem"])]
    if len({*runs}) > 1:
        raise ValueError("problems with more conversations than others: is one there twice?")
    names = (*COLUMNS, "well_formed_retry")
    columns = {name: [round(talk["values"][name], 4) for talk in talks] for name in names}
    shown = [{k: talk[k] for k in ("problem", "attempts")} for talk in talks[:: runs[0]][:SHOWN]]
    return {"samples": runs[0], "values": columns, "conversations": shown}


def rows_of(cell: dict) -> list[dict]:
    values = cell["values"]
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


def figures_of(cell: dict, base: dict) -> dict:
    """Of one evaluation, beside the base model's on the same problems."""
    rows, before, samples = rows_of(cell), rows_of(base), cell["samples"]
    for row, old in zip(rows, before, strict=True):
        row |= {f"gain_t{t}": row[f"acc_t{t}"] - old[f"acc_t{t}"] for t in (1, 2)}
    figures = summarize([{"values": row} for row in rows], samples)
    if samples > 1:
        figures |= {f"fresh{end}": value for end, value in fresh(rows, samples).items()}
    return figures


def fresh(rows: list[dict], samples: int) -> dict:
    """How often a first attempt is right where another one at the problem is wrong."""
    pairs = []
    for i in range(0, len(rows), samples):
        for a, b in permutations(rows[i : i + samples], 2):
            pairs.append({"acc_t1": a["acc_t1"], "acc_t2": b["acc_t1"], "well_formed_retry": 0.0})
    found = summarize([{"values": pair} for pair in pairs], samples * (samples - 1))
    return {end: found.get(f"retry_given_failure{end}", 0.0) for end in ("", "_se")}


def table(results: Path) -> str:
    """Markdown, in per cent, of all runs there."""
    found = {}
    for run in sorted(path.parent for path in results.glob("*/config.json")):
        cells = {path.stem: json.loads(path.read_text()) for path in run.glob("*_*.json")}
        for name in sorted(cells):
            who, _, mode = name.rpartition("_")
            figures = figures_of(cells[name], cells[f"base_{mode}"])
            found.setdefault(f"{run.name}: {who}", {})[mode] = figures
    return format_table(found, FIGURES)


def main(config: Config) -> None:
    results = Path(config.results)
    with exit_on_bad_input():
        for pair in (config.add or "").split(",") if config.add else ():
            name, is_pair, out = pair.partition("=")
            if not is_pair or "/" in name:
                raise ValueError(f"--add {pair}: give NAME=OUT")
            with naming(f"--add {pair}"):
                keep(name, Path(out), results)
        text = table(results)
    write_text(results / "table.md", text + "\n")
    print(text)


if __name__ == "__main__":
    run_script(main, Config)
