"""bench/base_table.py: made in parts it is the table that one go makes, with evaluate's figures."""

import json
import random

import pytest

import base_table
import evaluate
from helpers import ROOT, refusal
from report.figures import summarize
from tasks import TASKS
from tasks.sources import content_hash
from training.flags import parse_args

CELLS = ("tiny_tiny_greedy.json", "tiny_tiny_sampled.json")


def make(results, *flags):
    flags = ["--model", str(ROOT / "models" / "tiny"), "--results", str(results), *flags]
    base_table.main(parse_args(base_table.Config, flags))
    return {path.name: json.loads(path.read_text()) for path in results.glob("*.json")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    results = tmp_path_factory.mktemp("base")
    return results, make(results, "--limit", "12")


def test_a_table_made_in_parts_is_the_one_made_at_once(whole, tmp_path):
    make(tmp_path, "--limit", "5", "--piece", "3")
    found = make(tmp_path, "--limit", "12", "--piece", "4")
    assert sorted(found) == [*CELLS] and found == whole[1]
    assert (tmp_path / "table.md").read_text() == (whole[0] / "table.md").read_text()


def test_what_is_there_is_not_made_again(whole, monkeypatch):
    monkeypatch.setattr(base_table, "pieces", lambda *more: pytest.fail("sampled again"))
    assert make(whole[0], "--limit", "12") == whole[1]


@pytest.mark.parametrize("method", base_table.METHODS)
def test_figures_are_those_of_an_evaluation(whole, method, tmp_path):
    flags = ["--model", str(ROOT / "models" / "tiny"), "--split", "test", "--limit", "12"]
    flags += ["--temperature", "1", "--method", method, "--output", str(tmp_path / "own.json")]
    evaluate.main(parse_args(evaluate.Config, flags))
    own = json.loads((tmp_path / "own.json").read_text())
    cell = whole[1]["tiny_tiny_sampled.json"]
    rows = base_table.rows_of(cell["values"][method])
    found = summarize([{"values": row} for row in rows])
    assert 0 < found["failures"] < found["n"] == 12  # some have a reflection, some none
    assert found == pytest.approx({key: own[key] for key in found}, abs=1e-4)
    shown = cell["conversations"][method]
    assert len(shown) == 3 and shown[2]["attempts"] == own["conversations"][2]["attempts"]


def test_the_time_ends_it_between_two_pieces_and_the_table_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(base_table, "time_is_up", lambda config: len([*tmp_path.glob("*.json")]))
    found = make(tmp_path, "--limit", "12", "--piece", "4")
    assert [len(cell["values"]["self_correct"]["acc_t1"]) for cell in found.values()] == [4]
    assert "n = 4 | greedy" in (tmp_path / "table.md").read_text()


def test_what_was_made_otherwise_is_not_gone_on_from(whole, capsys):
    flags = ("--model", ROOT / "models" / "tiny", "--results", whole[0], "--limit", "14")
    said = refusal(base_table, capsys, *flags, "--max_new_tokens", "15")
    assert "tiny_tiny_greedy.json was made with other token limits" in said


def test_the_table_that_is_published_is_that_of_its_files():
    results = ROOT / "results" / "base"
    assert (results / "table.md").read_text() == base_table.table(results) + "\n"


def test_held_out_problems_are_those_of_lowest_hash_each_once():
    task, problems = TASKS["countdown"], TASKS["countdown"].generate("test", 0)[:40]
    found = base_table.lowest(task, problems, 10)
    random.Random(0).shuffle(twice := problems * 2)
    assert base_table.lowest(task, twice, 10) == found
    hashes = sorted(content_hash(task.key(problem)) for problem in problems)
    assert [content_hash(task.key(problem)) for problem in found] == hashes[:10]
    with pytest.raises(ValueError, match="--held_out 50: there are 40 problems"):
        base_table.lowest(task, problems, 50)
