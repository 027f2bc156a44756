"""bench/real_runs.py: what is kept of a run gives evaluate's figures, and two of its own."""

import json

import pytest

import real_runs
from helpers import ROOT, refusal
from report.figures import summarize


def talk(problem: int, first: int, second: int) -> dict:
    values = {"acc_t1": first, "acc_t2": second, "delta": second - first}
    values |= {"i_to_c": (1 - first) * second, "c_to_i": first * (1 - second), "changed": 0.0}
    values |= {"well_formed": 1.0, "well_formed_retry": 1.0, "tokens": 9}
    return {"problem": {"id": problem}, "attempts": [], "said": [], "values": values}


BASE = [talk(0, 1, 0), talk(0, 0, 0), talk(0, 0, 1), talk(1, 0, 0), talk(1, 0, 0), talk(1, 0, 0)]
TRAINED = [talk(0, 1, 1)] * 3 + [talk(1, 1, 1), talk(1, 0, 0), talk(1, 0, 0)]


@pytest.fixture
def run(tmp_path):
    out = tmp_path / "out"
    (out / "run").mkdir(parents=True)
    (out / "eval").mkdir()
    (out / "run" / "config.json").write_text('{"model": "here", "lr": 5e-05}')
    for name in ("metrics.jsonl", "curves.png"):
        (out / "run" / name).write_text("")
    for name, talks in (("base", BASE), ("trained_000009", TRAINED)):
        cell = json.dumps({"conversations": talks})
        (out / "eval" / f"{name}_sampled.json").write_text(cell)
    return out


def test_figures_are_those_of_an_evaluation_and_gains_are_paired(run, tmp_path):
    real_runs.keep("mine", run, tmp_path / "kept")
    cells = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "kept/mine").glob("*_*.json")}
    found = real_runs.figures_of(cells["trained_000009_sampled"], cells["base_sampled"])
    own = summarize(TRAINED, samples=3)
    assert {k: found[k] for k in own if "tokens" not in k} == pytest.approx(
        {k: v for k, v in own.items() if "tokens" not in k}
    )
    # problems gain 2 and 1 of 3: (2/3 + 1/3) / 2, and half their difference is the error
    assert found["gain_t1"] == pytest.approx(1 / 2) and found["gain_t1_se"] == pytest.approx(1 / 6)
    assert json.loads((tmp_path / "kept/mine/config.json").read_text()) == {"lr": 5e-05}
    assert "mine: trained_000009 | sampled | 66.7" in real_runs.table(tmp_path / "kept")


def test_fresh_is_how_often_the_sisters_of_wrong_first_attempts_are_right():
    rows = real_runs.rows_of(real_runs.kept_of(BASE))
    # two wrong ones have sisters (right, wrong) each, three have two wrong ones each
    assert real_runs.fresh(rows, 3)[""] == pytest.approx(2 / 10)


def test_a_name_that_is_taken_and_what_is_no_run_are_refused(run, tmp_path, capsys):
    real_runs.keep("mine", run, tmp_path / "kept")
    kept = ("--results", tmp_path / "kept", "--add")
    assert "kept/mine exists" in refusal(real_runs, capsys, *kept, f"mine={run}")
    assert "no evaluated run" in refusal(real_runs, capsys, *kept, f"other={tmp_path}")
    assert "give NAME=OUT" in refusal(real_runs, capsys, *kept, "other")


def test_the_table_that_is_published_is_that_of_its_files():
    results = ROOT / "results" / "real"
    assert (results / "table.md").read_text() == real_runs.table(results) + "\n"
