"""bench/real_runs.py: what is kept of a run gives evaluate's figures, and two of its own."""

import json

import pytest

import real_runs
from helpers import ROOT, refusal
from report.figures import summarize


def talk(problem: int, first: int, second: int) -> dict:
    values = {"acc_t1": first, "acc_t2": second, "delta": second - first}
    values |= {"i_to_c": (1 - first) * second, "c_to_i": first * (1 - second), "changed": 0.0}
    values |= {"well_formed": 1.0, "well_formed_retry": 1.0, "edit_ratio": 0.5, "tokens": 9}
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


def test_fresh_is_how_often_others_at_the_problem_of_a_wrong_first_attempt_are_right():
    rows = real_runs.rows_of(real_runs.kept_of(TRAINED))
    # two are wrong, both at the second problem, each beside a right and a wrong one
    assert real_runs.fresh(rows, 3)[""] == pytest.approx(1 / 2)


def test_what_can_not_be_compared_is_refused_and_nothing_is_kept(run, tmp_path, capsys):
    kept = ("--results", tmp_path / "kept", "--add")
    assert "give NAME=OUT" in refusal(real_runs, capsys, *kept, "mine")
    assert "no run of" in refusal(real_runs, capsys, *kept, f"mine={tmp_path}")
    base, trained = (run / "eval" / f"{n}_sampled.json" for n in ("base", "trained_000009"))
    base.write_text(json.dumps({"conversations": BASE[3:] + BASE[:3]}))
    assert "are of other problems" in refusal(real_runs, capsys, *kept, f"mine={run}")
    base.unlink()
    assert "base_sampled.json is missing" in refusal(real_runs, capsys, *kept, f"mine={run}")
    trained.unlink()
    assert "has not been evaluated" in refusal(real_runs, capsys, *kept, f"mine={run}")
    assert not (tmp_path / "kept" / "mine").exists()


def test_a_name_that_is_taken_is_refused(run, tmp_path, capsys):
    real_runs.keep("mine", run, tmp_path / "kept")
    said = refusal(real_runs, capsys, "--results", tmp_path / "kept", "--add", f"mine={run}")
    assert "kept/mine exists" in said


def test_the_table_that_is_published_is_that_of_its_files():
    results = ROOT / "results" / "real"
    assert (results / "table.md").read_text() == real_runs.table(results) + "\n"
