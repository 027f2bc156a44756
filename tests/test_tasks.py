import json

import pytest

from evaluate import Config
from tasks import TASKS, countdown_key, enumerate_steps, generate_countdown, load_task, tiny_splits
from verifiers import run_steps


def test_splits_are_disjoint_whatever_the_order_of_the_numbers():
    seen = [{countdown_key(p) for p in split} for split in tiny_splits().values()]
    assert [len(s) for s in seen] == [1500, 1500, 13004]
    assert sum(len(s) for s in seen) == len(set.union(*seen))
    assert countdown_key({"nums": [3, 1, 2], "target": 6}) == countdown_key({"nums": [1, 2, 3], "target": 6})


def test_generated_countdown_splits_are_disjoint_for_any_seeds():
    train, test = (generate_countdown(s, seed, count=300) for s, seed in (("train", 0), ("test", 1)))
    assert not {countdown_key(p) for p in train} & {countdown_key(p) for p in test}
    assert train == generate_countdown("train", 0, count=300)


def test_every_enumerated_derivation_is_honest_and_every_problem_is_solvable():
    for first, second in enumerate_steps((8, 16, 19)):
        text = "{} {} {} = {} ; {} {} {} = {}".format(*first, *second)
        assert run_steps(text, [16, 19, 8]) == second[3]
    for problem in tiny_splits()["test"][:50]:
        assert any(s[3] == problem["target"] for _, s in enumerate_steps(tuple(problem["nums"])))


def test_tiny_verdict_word_is_no_part_of_the_answer():
    task, problem = TASKS["tiny"], {"nums": [8, 19, 16], "target": 24}
    steps = "19 - 16 = 3 ; 8 * 3 = 24"
    assert task.answer("bad " + steps, problem) == task.answer(steps, problem) == steps
    assert task.verify("ok " + steps, problem) and not task.verify("ok bad " + steps, problem)
    assert task.answer("19 - 16 = 4 ; 8 * 4 = 32", problem) is None


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_an_unknown_task_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown task 'sudoku'.*tiny"):
        load_task(Config(task="sudoku"), ["train"])


COUNTDOWN = {"nums": [1, 2], "target": 3, "solution": "1 + 2"}


@pytest.mark.parametrize("line, message", [
    ("{", "line 2: not JSON"),
    ("[]", "line 2: not a JSON object"),
    ('{"nums": [1, 2]}', "line 2: field 'target'"),
    ('{"nums": [1, 2], "target": 3.0}', "line 2: field 'target'"),
    ('{"nums": [], "target": 3}', "line 2: field 'nums'"),
    ('{"nums": [1, "a"], "target": 3}', "line 2: field 'nums'"),
    ('{"nums": [0, 2], "target": 3}', "line 2: field 'nums'"),
    ('{"nums": [true, 2], "target": 3}', "line 2: field 'nums'"),
])  # fmt: skip
def test_a_bad_line_of_data_is_named_by_file_line_and_field(tmp_path, line, message):
    path = write(tmp_path / "data.jsonl", [COUNTDOWN, line])
    with pytest.raises(ValueError, match=f"data.jsonl, {message}"):
        load_task(Config(task="countdown", data=path), ["train"])


def test_held_out_countdown_problems_do_not_depend_on_the_seed():
    assert generate_countdown("test", 0, count=50) == generate_countdown("test", 7, count=50)
