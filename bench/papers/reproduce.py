"""Reruns the papers' argument on the embedded model, by its costs in six hours on two cores.

    python bench/papers/reproduce.py                    # all of it
    python bench/papers/reproduce.py --quick            # 15 minutes: fewer methods, seeds and steps
    python bench/papers/reproduce.py --only tune,main   # some of the experiments in plan.py
    python bench/papers/reproduce.py --render           # tables and pictures again, from the CSVs

All methods have equal budgets: as many steps of 256 rows (or 320 attempts), for samples and
gradients alike. The learning rate of each is chosen on validation, from the same grid and with a
seed of its own; then its test figures are taken once a run. Runs go on where they were stopped,
several at a time with one thread each. Writes CSVs, tables and pictures into results/reproduce
(tables.py, pictures.py), after every experiment; what its CSVs have of runs that are gone is kept.
"""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

import pictures  # noqa: E402
import tables  # noqa: E402
from plan import AFTER, EXPERIMENTS, METHODS, QUICK, TUNED, UNTRAINED, Experiment, Run  # noqa: E402
from rates import COMMITTED, learning_rate, require_rates, tuning_rows, tuning_runs  # noqa: E402
from training.flags import exit_on_bad_input, flag, parse_args  # noqa: E402


@dataclass
class Config:
    only: str | None = flag(None, f"with commas between: tune, noise, {', '.join(EXPERIMENTS)}")
    quick: bool = flag(False, "a small part, in runs/quick, with rates that were chosen before")
    missing: bool = flag(False, "only what the CSVs have no figures of, though runs may be gone")
    render: bool = flag(False, "only tables and pictures, from the CSVs")
    list: bool = flag(False, "only say what there is to do, and about how much of it")
    jobs: int = flag(2, "runs at a time, with a thread each")
    pretrained: str = flag("runs/tiny/pretrained", "the base before its own RL, for before_rl: "
                           "`python tiny.py --output runs/tiny/new`")  # fmt: skip

    @property
    def runs(self) -> Path:
        return ROOT / "runs" / ("quick" if self.quick else "reproduce")

    @property
    def results(self) -> Path:
        return self.runs / "results" if self.quick else COMMITTED


def base_model(name: str, config) -> str:
    return str((ROOT / ("models/tiny" if name == "tiny" else config.pretrained)).resolve())


def command_of(run: Run, config) -> list[str]:
    stage1 = run.steps * 3 // 16
    sizes = {"steps": run.steps, "stage1": stage1, "stage2": run.steps - stage1}
    before = earlier(run, config)
    model = str(before.directory(config) / "checkpoint") if before else base_model(run.base, config)
    command = [sys.executable, *METHODS[run.method].format(**sizes).split()]
    command += ["--model", model, "--lr", f"{run.lr:g}", "--seed", str(run.seed)]
    # only tuning looks at all of validation in the end: the others have the test split
    command += [] if run.tuning else ["--final_problems", "300"]
    return [*command, "--output_dir", str(run.directory(config))]


def earlier(run: Run, config) -> Run | None:
    """The run that this one starts from."""
    if run.method not in AFTER:
        return None
    method = AFTER[run.method]
    return run._replace(method=method, lr=learning_rate(method, config), more=False, tuning=True)


children = set()  # processes that are at work


def launch(command: list[str], log: Path) -> None:
    settings = os.environ | {"OMP_NUM_THREADS": "1"}
    # in a session of its own: Ctrl-C is for this process, which asks them to save
    with open(log, "a") as file:
        child = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=file, env=settings, start_new_session=True
        )
    children.add(child)
    code = child.wait()
    children.discard(child)
    if code:
        raise subprocess.CalledProcessError(code, command)


def launch_measure(flags: list[str], output: Path, log: Path) -> None:
    launch([sys.executable, str(HERE / "measure.py"), *flags, "--output", str(output)], log)


def complete(run: Run, config) -> None:
    """Trains and measures, as far as that isn't done yet."""
    directory = run.directory(config)
    directory.parent.mkdir(parents=True, exist_ok=True)
    log = directory.with_name(directory.name + ".log")
    if before := earlier(run, config):
        complete(before, config)
    if run.script and not (directory / "results.json").exists():
        launch([*command_of(run, config), "--resume"], log)
    if not (directory / run.done).exists():
        directory.mkdir(exist_ok=True)
        base, trained = base_model(run.base, config), str(directory / "checkpoint")
        method = "reflect_retry" if run.script == "rrr.py" else "self_correct"
        method = UNTRAINED.get(run.method, method)
        flags = ["--base", base, "--model", trained if run.script else base, "--method", method]
        launch_measure([*flags, "--more", str(run.more)], directory / run.done, log)


def complete_all(runs: list[Run], config, label: str) -> list[str]:
    """All of them, several at a time; the names of those that failed."""
    todo = [run for run in runs if not (run.directory(config) / run.done).exists()]
    failed, total = [], round(sum(run.cost for run in todo))
    with tqdm(total=total, desc=label, unit="step") as bar, ThreadPoolExecutor(config.jobs) as pool:
        jobs = {pool.submit(complete, run, config): run for run in todo}
        try:
            for job in as_completed(jobs):
                name = str(jobs[job].directory(config))
                if job.exception():
                    failed.append(name)
                    tqdm.write(f"failed, see {name}.log: {job.exception()}", file=sys.stderr)
                bar.update(round(jobs[job].cost))
        except BaseException:  # Ctrl-C, SIGTERM
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(job.done() for job in jobs):
                while children:
                    children.pop().terminate()  # it saves its state
                time.sleep(0.1)
            raise
    return failed


def tune(config) -> list[str]:
    """Writes tuning.csv, what was tried and which was chosen; the names of runs that failed."""
    failed = []
    header = ("method", "lr", "score", "chosen", "greedy_acc_t1", "greedy_acc_t2",
              "sampled_acc_t1", "sampled_acc_t2")  # fmt: skip
    while due := tuning_runs(config, failed):
        try:
            failed += complete_all(due, config, "learning rates")
        finally:
            rows = [row for method in TUNED for row in tuning_rows(config, method, failed).values()]
            tables.write_csv(config.results / "tuning.csv", header, rows)
    return failed


def final_runs(experiments: dict[str, Experiment], config) -> list[Run]:
    """Each once, though several experiments may want it."""
    runs = {}
    for e in experiments.values():
        for seed in range(e.seeds):
            for method in e.methods:
                for run in runs_of(method, seed, e, config):
                    key = run._replace(more=False)
                    runs[key] = run if run.more or key not in runs else runs[key]
    return [*runs.values()]


def runs_of(method: str, seed: int, e: Experiment, config) -> list[Run]:
    """One for each number of steps; what is not trained is the same for all, and for every seed."""
    if method not in METHODS:
        return [Run(e.base, method, 0, 0, 0.0, e.more and method == "base")]
    lr = learning_rate(method, config)
    return [Run(e.base, method, steps, seed, lr, e.more) for steps in e.steps]


def write_results(experiments: dict[str, Experiment], config) -> None:
    """Everything that is known of the runs that are done, as CSVs."""
    rows = {"figures": [], "problems": [], "more": [], "curves": []}
    planned = final_runs(experiments, config)
    for run in planned:
        if (run.directory(config) / "test.json").exists():
            for name, found in rows_of(run, config).items():
                rows[name] += [[*identity_of(run), *cells] for cells in found]
    columns = {
        "figures": ["row", "mode", "seconds", *tables.FIGURES],
        "problems": ["row", "mode", "key", "bits"],
        "more": ["kind", "x", "value"],
        "curves": [*tables.CURVES],
    }
    for name in rows:
        merge(config.results / f"{name}.csv", columns[name], rows[name], planned)


def rows_of(run: Run, config) -> dict[str, list]:
    """{CSV: rows} of a run that is done, without its identity."""
    found = json.loads((run.directory(config) / "test.json").read_text())
    steps = read_metrics(run.directory(config))
    seconds = f"{sum(row['seconds_rollout'] + row['seconds_update'] for row in steps):.0f}"
    if not steps and "start" in found:  # the base: where the curves of the others begin
        steps = [{"stage": "", "step": -1, **found["start"]}]

    def figures(values: dict) -> list[str]:
        return [f"{values[key]:.5g}" if key in values else "" for key in tables.FIGURES]

    return {
        "figures": [[row, mode, seconds, *figures(values)]
                    for row, modes in found["figures"].items() for mode, values in modes.items()],
        "problems": [[row, mode, key, bits] for row, modes in found["bits"].items()
                     for mode, kept in modes.items() for key, bits in kept.items()],
        "more": [[kind, x, f"{value:.5g}"] for kind, x, value in found["more"]],
        "curves": tables.thinned(steps),
    }  # fmt: skip


def identity_of(run: Run) -> list[str]:
    return [run.base, run.method, str(run.steps), str(run.seed), f"{run.lr:g}"]


def is_known(run: Run, config) -> bool:
    """With --missing: whether the CSVs have it."""
    identity = dict(zip(tables.IDENTITY, identity_of(run), strict=True))
    figures = tables.read_csv(config.results / "figures.csv") if config.missing else []
    return bool(tables.of(figures, **identity))


def merge(path: Path, columns: list, fresh: list[list], planned: list[Run]) -> None:
    """Writes rows in the order of the plan; of runs not in `fresh`, those of before."""
    header, size, found = [*tables.IDENTITY, *columns], len(tables.IDENTITY), {}
    for rows in (([row.get(key, "") for key in header] for row in tables.read_csv(path)), fresh):
        newer = {}
        for row in rows:
            newer.setdefault(tuple(row[:size]), []).append(row)
        found |= newer
    rows = [row for run in planned for row in found.get(tuple(identity_of(run)), [])]
    tables.write_csv(path, header, rows)


def read_metrics(directory: Path) -> list[dict]:
    path = directory / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_noise(config) -> None:
    """noise.csv: at the base, and at one trained model if there is one."""
    trained = Run("tiny", "SCoRe", 320, 0, learning_rate("SCoRe", config)).directory(config)
    models = {"base": base_model("tiny", config), "SCoRe": str(trained / "checkpoint")}
    rows = []
    for name, model in models.items():
        output = config.runs / f"noise-{name}.json"
        if Path(model).exists() and not output.exists():
            config.runs.mkdir(parents=True, exist_ok=True)
            log = output.with_suffix(".log")
            launch_measure(["--noise", "True", "--model", model], output, log)
        if output.exists():
            rows += [{"model": name, **row} for row in json.loads(output.read_text())]
    cells = [[f"{x}" for x in row.values()] for row in rows]
    tables.write_csv(config.results / "noise.csv", [*rows[0]], cells)


def chosen_experiments(config) -> tuple[dict, set]:
    """({name: Experiment}, other things to do); a name that there isn't is a ValueError."""
    table = QUICK if config.quick else EXPERIMENTS
    names = [*table] + ["tune", "noise"] * (not config.quick)
    names = config.only.split(",") if config.only else names
    unknown = [name for name in names if name not in (*table, "tune", "noise")]
    if unknown:
        raise ValueError(f"--only {unknown[0]}: choose from tune, noise, {', '.join(table)}")
    chosen = {name: table[name] for name in table if name in names}
    missing = not config.render and not Path(base_model("pretrained", config)).exists()
    if "before_rl" in chosen and missing:
        how = "is not there: `python tiny.py --output runs/tiny/new` makes it"
        how = f"--pretrained {config.pretrained} {how}"
        if config.only:
            raise ValueError(f"before_rl: {how}")
        print(f"before_rl is left out: {how}")
        del chosen["before_rl"]
    return chosen, {*names} - {*table}


def print_plan(chosen: dict[str, Experiment], others: set, config) -> None:
    planned = {"tune": tuning_runs(config, [])} if "tune" in others else {}
    planned |= {name: final_runs({name: e}, config) for name, e in chosen.items()}
    for name, runs in planned.items():
        cost = sum(run.cost for run in runs)
        print(f"{name}: {len(runs)} runs, as much as {cost:.0f} steps of score.py")


def run_all(chosen: dict[str, Experiment], others: set, config) -> list[str]:
    """All that is to be trained and measured; the names of the runs that failed."""
    failed = tune(config) if "tune" in others else []
    with exit_on_bad_input():
        require_rates(chosen, config)
    for name, experiment in chosen.items():
        try:
            runs = [r for r in final_runs({name: experiment}, config) if not is_known(r, config)]
            failed += complete_all(runs, config, name)
        finally:
            write_results(QUICK if config.quick else EXPERIMENTS, config)
    if "noise" in others and not (config.missing and (config.results / "noise.csv").exists()):
        write_noise(config)
    return failed


def main(config: Config) -> None:
    with exit_on_bad_input():
        chosen, others = chosen_experiments(config)
    if config.list:
        return print_plan(chosen, others, config)
    failed = [] if config.render else run_all(chosen, others, config)
    tables.write_tables(config.results)
    pictures.draw_all(config.results)
    if failed:
        sys.exit(f"{len(failed)} runs failed: call it again to go on")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main(parse_args(Config))
