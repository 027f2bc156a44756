"""The reproduction: what it plans, how it goes on, chooses, compares and draws."""

import json
import shutil
import signal
import sys
import threading
import time

import numpy as np
import pytest

import baselines
import helpers
import measure
import pictures
import rates
import reproduce
import rrr
import score
import tables
from tasks.env import Env, Verdicts
from training.flags import parse_args

SCRIPTS = {"score.py": score, "baselines.py": baselines, "rrr.py": rrr}


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce.Config, "runs", tmp_path / "runs")
    monkeypatch.setattr(reproduce.Config, "results", tmp_path / "results")
    monkeypatch.setattr(rates, "COMMITTED", tmp_path / "none")
    return reproduce.Config()


def set_tuned(monkeypatch, *methods):
    for module in (rates, reproduce):
        monkeypatch.setattr(module, "TUNED", methods)


def runs_of(experiments, config):
    return reproduce.final_runs(experiments, config)


@pytest.mark.parametrize("steps", [160, 320, 640])
def test_every_command_parses_and_has_the_budget(steps, config):
    for method in reproduce.METHODS:
        command = reproduce.command_of(reproduce.Run("tiny", method, steps, 3, 1e-4), config)
        script = SCRIPTS[command[1]]
        flags = parse_args(script.Config, command[2:])
        script.check(flags)
        assert flags.seed == 3 and flags.lr == 1e-4
        if script is rrr:
            assert flags.steps == steps
            continue
        total = flags.steps if script is baselines else flags.stage1_steps + flags.stage2_steps
        stage1 = steps * 3 // 16
        assert total == {"Stage I": stage1, "Stage I, then STaR": steps - stage1}.get(method, steps)
        attempts = flags.problems * flags.group_size
        if not getattr(flags, "single_turn", False):
            attempts += flags.problems * flags.group_size * flags.second_attempts
        assert attempts == 320, method  # sampled a step


def test_every_experiment_has_methods_that_there_are_and_runs_are_shared(config):
    for table in (reproduce.EXPERIMENTS, reproduce.QUICK):
        for e in table.values():
            assert {*e.methods} <= {*reproduce.METHODS, *reproduce.UNTRAINED}
        runs = runs_of(table, config)
        directories = [run.directory(config) for run in runs]
        assert len({*directories}) == len(directories)
    twice = {str(more): reproduce.Experiment(("SCoRe",), more=more) for more in (False, True)}
    assert [run.more for run in runs_of(twice, config)] == [True] * 5


def test_claims_and_tables_are_about_runs_that_are_made():
    planned = {(m, n) for e in reproduce.EXPERIMENTS.values() for m in e.methods for n in e.steps}
    for _, one, other, _, steps in tables.CLAIMS:
        for method in (one, other):
            assert method is None or (method, steps) in planned, method
    assert {*tables.TABLE1, *tables.TABLE2} <= {m for m, _ in planned}
    known = {*measure.controls("base", "trained"), ""}
    for _, *sides, _ in tables.RRR_CLAIMS:
        assert all(row in known and (method, 250) in planned for method, row in sides)


def fake_launch(command, log):
    """Instead of training or measuring: the file that would be there afterwards."""
    out = command[command.index("--output_dir" if "--output_dir" in command else "--output") + 1]
    if "--output_dir" in command:
        path = reproduce.Path(out) / "results.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        lr = float(command[command.index("--lr") + 1])
        modes = {mode: {k: 1 - abs(lr - 1.5e-4) for k in ("acc_t1", "acc_t2")}
                 for mode in ("greedy", "sampled")}  # fmt: skip
        path.write_text(json.dumps({"trained": modes}))
        row = {"stage": 2, "step": 0, "acc_t1": 0.5, "seconds_rollout": 1, "seconds_update": 1}
        (path.parent / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    else:
        keys = ("acc_t1", "acc_t1_se", "acc_t2", "acc_t2_se")
        figures = {mode: dict.fromkeys(keys, 0.25) for mode in ("greedy", "sampled")}
        bits = {mode: {key: measure.bits([1, 0, 1]) for key in keys[::2]} for mode in figures}
        content = {"figures": {"": figures}, "bits": {"": bits}, "more": []}
        if command[command.index("--model") + 1] == command[command.index("--base") + 1]:
            content["start"] = {"eval_acc_t1": 0.5, "eval_acc_t2": 0.4}
        reproduce.Path(out).write_text(json.dumps(content))
    launched.append(command)


launched = []


def test_runs_go_on_where_they_were_and_write_what_was_tried(config, monkeypatch, capsys):
    launched.clear()
    monkeypatch.setattr(reproduce, "launch", fake_launch)
    set_tuned(monkeypatch, "SCoRe", "RRR")
    small = {"main": reproduce.Experiment(("base", "SCoRe", "Stage I, then STaR"), seeds=2)}
    monkeypatch.setattr(reproduce, "EXPERIMENTS", small)
    config.only = "tune,main"
    reproduce.main(config)
    measured = [any(part.endswith("bench/papers/measure.py") for part in c) for c in launched]
    assert not any(measured[:8])  # a learning rate is chosen without the test split
    assert all(c[c.index("--seed") + 1] == "100" for c in launched[:8])
    assert sum(measured) == 5  # the base, and two runs of two methods
    assert len(launched) == 8 + 5 + 4 + 2  # and Stage I of both seeds
    stage1 = [c for c in launched if "--save_every" in c]
    star = [c for c in launched if "star" in c]
    models = {c[c.index("--model") + 1] for c in star}
    assert models == {c[c.index("--output_dir") + 1] + "/checkpoint" for c in stage1}
    tried = tables.read_csv(config.results / "tuning.csv")
    chosen = [(r["method"], r["lr"]) for r in tried if r["chosen"] == "1"]
    assert chosen == [("SCoRe", "0.00015"), ("RRR", "0.00015")]
    assert reproduce.learning_rate("alpha 3", config) == 1.5e-4
    assert len(tables.read_csv(config.results / "figures.csv")) == 2 * 5
    assert "## take-off (tiny)" in (config.results / "tables.md").read_text()
    start = tables.read_csv(config.results / "curves.csv")[0]
    assert (start["method"], start["step"], start["eval_acc_t2"]) == ("base", "-1", "0.4")

    before = len(launched)
    reproduce.main(config)
    assert len(launched) == before  # nothing is left to do
    files = {path.name: path.read_bytes() for path in config.results.glob("*.[cm]*")}
    config.render = True
    reproduce.main(config)
    assert {path.name: path.read_bytes() for path in config.results.glob("*.[cm]*")} == files

    config.render = False
    for run in (config.runs / "tiny").glob("*-0.00015-*[01]"):
        shutil.rmtree(run)  # of another session: its rows are kept
    config.missing = True
    reproduce.main(config)
    assert len(launched) == before and not [*(config.runs / "tiny").glob("SCoRe-320-0.00015-*")]
    assert {path.name: path.read_bytes() for path in config.results.glob("*.[cm]*")} == files


def test_without_a_chosen_rate_nothing_is_trained_and_a_run_that_failed_was_tried(
    config, monkeypatch, capsys
):
    launched.clear()
    set_tuned(monkeypatch, "SCoRe")
    one = {"main": reproduce.Experiment(("SCoRe",), seeds=1)}
    monkeypatch.setattr(reproduce, "EXPERIMENTS", one)
    config.only = "main"
    with pytest.raises(SystemExit):
        reproduce.main(config)
    assert "no learning rate is chosen yet for SCoRe: --only tune" in capsys.readouterr().err
    assert not launched

    def collapse(command, log):
        if "--lr" in command and command[command.index("--lr") + 1] == "0.0005":
            raise RuntimeError("nothing can be imitated")
        fake_launch(command, log)

    monkeypatch.setattr(reproduce, "launch", collapse)
    config.only = "tune,main"
    with pytest.raises(SystemExit, match="1 runs failed"):
        reproduce.main(config)
    tried = {row["lr"]: row for row in tables.read_csv(config.results / "tuning.csv")}
    assert tried["0.0005"]["score"] == "-inf" and tried["0.00015"]["chosen"] == "1"
    assert len(tables.read_csv(config.results / "figures.csv")) == 2


def test_a_best_rate_at_the_edge_has_the_next_one_tried_too():
    grid = dict.fromkeys(rates.GRID, 0.5)
    assert rates.rates_due({}) == [*rates.GRID]
    assert rates.rates_due(grid | {5e-5: 0.6}) == []
    assert rates.rates_due(grid | {1.5e-5: 0.6}) == [5e-6]
    assert rates.rates_due(grid | {1.5e-5: 0.6, 5e-6: 0.55}) == []
    # the end of the ladder
    assert rates.rates_due(grid | {1.5e-5: 0.6, 5e-6: 0.65, 1.5e-6: 0.7}) == []
    assert rates.rates_due(grid | {5e-4: 0.6}) == [1.5e-3]


def test_a_rate_is_judged_by_what_the_method_trains():
    greedy, sampled = {"acc_t1": 0.5, "acc_t2": 0.6}, {"acc_t1": 0.3, "acc_t2": 0.5}
    results = {"trained": {"greedy": greedy, "sampled": sampled}}
    assert rates.score_of(results, "single-turn RL") == pytest.approx(0.4)
    assert rates.score_of(results, "RRR") == pytest.approx(0.55)


def test_a_run_that_fails_is_named_and_the_others_go_on(config, monkeypatch, capsys):
    def fail_once(command, log):
        if "--seed" in command and command[command.index("--seed") + 1] == "1":
            raise RuntimeError("broken")
        fake_launch(command, log)

    monkeypatch.setattr(reproduce, "launch", fail_once)
    three = {"main": reproduce.Experiment(("SCoRe",), seeds=3)}
    monkeypatch.setattr(reproduce, "EXPERIMENTS", three)
    monkeypatch.setattr(rates, "chosen_rate", lambda method, config: 1.5e-4)
    config.only = "main"
    with pytest.raises(SystemExit, match="1 runs failed: call it again"):
        reproduce.main(config)
    seeds = [row["seed"] for row in tables.read_csv(config.results / "figures.csv")]
    assert seeds == ["0", "0", "2", "2"]
    assert "SCoRe-320-0.00015-1.log: broken" in capsys.readouterr().err


def test_when_it_is_stopped_its_runs_are_told_to_save_and_no_other_begins(
    config, monkeypatch, tmp_path
):
    log, saved = tmp_path / "log", tmp_path / "saved"
    script = (
        "import signal, sys, time\n"
        "def save(*_): open(sys.argv[1], 'a').write('x'); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save); print('ready', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(saved)]
    monkeypatch.setattr(reproduce, "complete", lambda run, config: reproduce.launch(command, log))

    def interrupt():
        while not log.exists() or log.read_text().count("ready") < 2:
            time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    # a shell's background jobs ignore it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    runs = [reproduce.Run("tiny", "SCoRe", 320, seed, 1e-4) for seed in range(4)]
    try:
        with pytest.raises(KeyboardInterrupt):
            reproduce.complete_all(runs, config, "")
    finally:
        signal.signal(signal.SIGINT, before)
    assert saved.read_text() == "xx" and log.read_text().count("ready") == 2


@pytest.mark.parametrize(
    "only, message", [("mian", "--only mian: choose from"), ("before_rl", "tiny.py")]
)
def test_bad_input_is_one_line_and_exit_code_2(only, message, capsys, tmp_path):
    said = helpers.refusal(reproduce, capsys, "--only", only, "--pretrained", tmp_path / "none")
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "df, expected", [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (60, 2.000)]
)
def test_quantiles_of_students_t(df, expected):
    assert tables.quantile(df) == pytest.approx(expected, abs=0.01)


def test_effects_where_only_seeds_or_only_problems_differ_are_those_of_one_sample():
    seeds = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    mean, low, high = tables.effect(np.repeat(seeds[:, None], 1000, axis=1))
    half = 2.776 * seeds.std(ddof=1) / 5**0.5
    assert (mean, low, high) == pytest.approx((3, 3 - half, 3 + half), abs=1e-2)
    problems = np.random.default_rng(0).normal(size=1000)
    mean, low, high = tables.effect(np.repeat(problems[None], 5, axis=0))
    half = 1.96 * problems.std(ddof=1) / 1000**0.5
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=1e-3)
    assert tables.effect(np.zeros((3, 10))) == (0, 0, 0)
    alone = tables.effect(problems[None])
    assert alone == pytest.approx((mean, mean - half, mean + half), abs=1e-3)


def test_intervals_of_effects_cover_the_truth_nineteen_times_of_twenty():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        crossed = 0.6 * rng.normal(size=(20, 1)) + rng.normal(size=(1, 60))
        crossed = crossed + rng.normal(size=(20, 60))
        _, low, high = tables.effect(0.5 + crossed)
        covered += low < 0.5 < high
    assert 0.92 <= covered / 400 <= 0.98


def test_bits_come_back_and_effects_are_paired():
    rows = []
    for seed, second in enumerate(([1, 1, 1, 0, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 0, 0, 0, 1])):
        identity = {"base": "tiny", "method": "SCoRe", "steps": "320", "seed": str(seed)}
        identity |= {"row": "", "mode": "greedy"}
        rows += [identity | {"key": "acc_t1", "bits": measure.bits([1, 0, 0, 0, 0, 0, 0, 0, 1])}]
        rows += [identity | {"key": "acc_t2", "bits": measure.bits(second)}]
    delta = tables.outcomes(rows, "delta", method="SCoRe")
    assert delta["0"].tolist() == [0, 1, 1, 0, 0, 0, 0, 0, 0]
    found = {claim: rest for _, claim, *rest in tables.effects(rows)}
    assert [*found] == ["Delta is above 0: SCoRe"]
    *head, mean, low, high = found["Delta is above 0: SCoRe"]
    assert head == [320, "greedy", 2]
    assert mean == pytest.approx(100 * 1.5 / 9) and low < mean < high


def test_take_off_is_above_five_points_and_counts_steps_from_one():
    at = {39: ("0.5", "0.55"), 79: ("0.5", "0.5533")}  # of 300 problems: 15 more, 16 more
    rows = [
        {"base": "tiny", "method": "SCoRe", "steps": "80", "seed": "0", "step": str(step),
         "eval_acc_t1": t1, "eval_acc_t2": t2} for step, (t1, t2) in at.items()
    ]  # fmt: skip
    assert tables.takeoff_table(rows, "tiny").endswith("| SCoRe | 80 | 80 |")


def test_the_noise_of_a_gradient_is_without_the_noise_of_its_mean():
    rng = np.random.default_rng(0)
    gradients = measure.torch.tensor(3 + 2 * rng.normal(size=(400, 50)))
    found = measure.noise_of(gradients)
    assert found["variance"] == pytest.approx(50 * 4, rel=0.05)
    assert found["signal"] == pytest.approx(50 * 9, rel=0.05)
    assert found["batches"] == pytest.approx(found["variance"] / found["signal"])
    draws = [measure.torch.tensor(3 + 2 * rng.normal(size=(20, 50))) for _ in range(200)]
    twins = [measure.noise_of(some) for some in draws]
    for key in ("variance", "signal"):
        spread = np.std([twin[key] for twin in twins])
        assert np.mean([twin[key + "_se"] for twin in twins]) == pytest.approx(spread, rel=0.2), key


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return helpers.save_random_model(tmp_path_factory.mktemp("reproduce") / "model")


def test_a_model_is_measured_with_all_curves(model, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "VOTERS", 4)
    monkeypatch.setattr(measure, "VOTED", 3)
    monkeypatch.setattr(measure, "ATTEMPTS", 3)
    output = tmp_path / "test.json"
    measure.main(measure.Config(model=model, base=model, more=True, limit=5, output=str(output)))
    found = json.loads(output.read_text())
    assert found["figures"][""]["sampled"]["n"] == 5
    assert 0 <= found["start"]["eval_acc_t1"] <= 1  # where the curves of its descendants begin
    kinds = [kind for kind, _, _ in found["more"]]
    assert kinds.count("attempts") == 3
    assert kinds.count("vote_parallel") == kinds.count("vote_corrected") == 2
    ratios = [value for kind, _, value in found["more"] if kind == "edit_ratio"]
    assert sum(ratios) == pytest.approx(1)
    assert tables.unpacked(found["bits"][""]["sampled"]["vote_parallel_4"]).shape == (3,)
    assert tables.unpacked(found["bits"][""]["greedy"]["acc_t2"]).shape == (5,)


def test_the_controls_of_rrr_are_measured_once_for_the_base_and_once_for_each_model(
    model, tmp_path
):
    other = helpers.save_random_model(tmp_path / "other")
    rows = {}
    for name in (model, other):
        output = tmp_path / "test.json"
        flags = {"method": "reflect_retry", "limit": 3, "output": str(output)}
        measure.main(measure.Config(model=name, base=model, **flags))
        found = json.loads(output.read_text())
        rows[name] = [row for row in found["figures"] if row]
        assert ("start" in found) == (name == model)
    assert all(row.startswith("base,") for row in rows[model]) and len(rows[model]) == 4
    assert not any(row.startswith("base,") for row in rows[other]) and len(rows[other]) == 6


def test_noise_is_measured_for_every_design(model, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "DESIGNS", {"nested": (2, 2, 2), "flat": (2, 3, 1)})

    def by_ids(env, rollout, turn, problems):
        right = (rollout.ids.sum(1) % 2).float()
        return Verdicts(right, [], [], right)

    monkeypatch.setattr(Env, "verdicts", by_ids)
    output = tmp_path / "noise.json"
    measure.main(measure.Config(model=model, noise=True, batches=3, output=str(output)))
    rows = json.loads(output.read_text())
    designs = [(row["design"], row["alpha"]) for row in rows]
    assert designs == [(name, alpha) for alpha in (0, 10) for name in ("nested", "flat")]
    assert all(row["variance"] > 0 for row in rows)


def test_pictures_and_tables_are_drawn_from_the_csvs_alone(tmp_path):
    trained = [("SCoRe", 160), ("SCoRe", 320), ("multi-turn RL", 160), ("RRR", 250)]
    identities = [["tiny", m, n, s, "0.0001"] for m, n in trained for s in range(2)]
    identities += [["tiny", m, 0, 0, "0"] for m in ("base", "base, RRR")]
    curve = ["0.5"] * (len(tables.MEANS) + len(tables.LAST))
    kinds = ("edit_ratio", "attempts", "vote_parallel", "vote_corrected")
    contents = {
        "figures": ([*tables.IDENTITY, "row", "mode", "seconds", *tables.FIGURES],
                    [[*i, "", mode, "10", *["0.5"] * len(tables.FIGURES)] for i in identities
                     for mode in ("greedy", "sampled")]),
        "curves": ([*tables.IDENTITY, *tables.CURVES],
                   [[*i, stage, step, *curve] for i in identities
                    for stage, step in ((("1", 9), ("2", 19)) if i[2] else [("", -1)])]),
        "more": ([*tables.IDENTITY, "kind", "x", "value"],
                 [[*i, kind, x, 0.5] for i in identities for x in (1, 2) for kind in kinds]),
        "problems": ([*tables.IDENTITY, "row", "mode", "key", "bits"],
                     [[*i, "", "greedy", key, measure.bits([0, 1, 1])] for i in identities
                      for key in ("acc_t1", "acc_t2")]),
    }  # fmt: skip
    for name, (header, rows) in contents.items():
        tables.write_csv(tmp_path / f"{name}.csv", header, rows)
    tables.write_tables(tmp_path)
    pictures.draw_all(tmp_path)
    drawn = {path.name for path in tmp_path.glob("*.png*")}
    assert drawn == {path.name for path in reproduce.COMMITTED.glob("*.png")}
    text = (tmp_path / "tables.md").read_text()
    assert "| SCoRe | 320 | 2 | greedy | 50.0 ± 50.0 |" in text
    assert "SCoRe raises first attempts" in text


def test_where_there_are_no_rows_there_is_no_picture(tmp_path):
    pictures.draw_all(tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_curve_begins_at_the_base_and_ends_where_all_seeds_have_been():
    def row(method, steps, seed, step, value):
        return {"method": method, "steps": str(steps), "seed": str(seed), "step": str(step),
                "eval_acc_t2": value}  # fmt: skip

    rows = [row("base", 0, 0, -1, "0.4")]
    rows += [row("SCoRe", 320, 0, step, value) for step, value in ((9, ""), (39, "0.5"))]
    rows += [row("SCoRe", 320, 1, step, value) for step, value in ((39, "0.6"), (79, "0.7"))]
    x, values = pictures.course(rows, "SCoRe", 320, pictures.per_cent("eval_acc_t2"))
    assert x.tolist() == [0, 40] and values.tolist() == [[40, 50], [40, 60]]


def test_the_committed_tables_are_those_of_the_committed_csvs(tmp_path):
    for path in reproduce.COMMITTED.glob("*.csv"):
        shutil.copy(path, tmp_path)
    tables.write_tables(tmp_path)
    fresh, committed = (folder / "tables.md" for folder in (tmp_path, reproduce.COMMITTED))
    assert fresh.read_text() == committed.read_text()


def test_a_runs_metrics_are_thinned_to_means_and_last_evaluations():
    steps = [{"stage": 1, "step": t, "acc_t1": t / 10, "eval_acc_t2": t} for t in range(10)]
    (row,) = tables.thinned([*steps[:9], steps[9] | {"eval_acc_t2": 0.75}])
    found = dict(zip(tables.CURVES, row))
    assert (found["stage"], found["step"], found["kl_t1"]) == (1, 9, "")
    assert (found["acc_t1"], found["eval_acc_t2"]) == ("0.45", "0.75")
