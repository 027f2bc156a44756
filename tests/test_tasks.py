import json
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tasks import TASKS
from tasks.countdown import countdown_key, generate_countdown
from tasks.loading import load_task
from tasks.sources import SPLITS, read_rows, split_of
from tasks.tiny import enumerate_steps, run_steps, tiny_splits


def test_splits_are_disjoint_whatever_the_order_of_the_numbers():
    seen = [{countdown_key(p) for p in split} for split in tiny_splits().values()]
    assert [len(s) for s in seen] == [1500, 1500, 13004]
    assert sum(len(s) for s in seen) == len(set.union(*seen))
    one, same = {"nums": [3, 1, 2], "target": 6}, {"nums": [1, 2, 3], "target": 6}
    assert countdown_key(one) == countdown_key(same)


def test_generated_countdown_splits_are_disjoint_for_any_seeds():
    train = generate_countdown("train", 0, count=300)
    test = generate_countdown("test", 1, count=300)
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


def flags(**given):
    """What load_task reads of a script's flags."""
    flags = {"task": "tiny", "data": None, "seed": 0, "prompts": None, "unsafe": False}
    flags |= {"code_timeout": 5.0, "code_numpy": False}
    return SimpleNamespace(**flags | {"shots": None, "shots_file": None} | given)


def write(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def test_an_unknown_task_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown task 'sudoku'.*tiny"):
        load_task(flags(task="sudoku"), ["train"])


COUNTDOWN = {"nums": [1, 2], "target": 3, "solution": "1 + 2"}
OTHER = {"nums": [5, 5], "target": 25, "solution": "5 * 5"}


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
        load_task(flags(task="countdown", data=path), ["train"])


def test_held_out_countdown_problems_do_not_depend_on_the_seed():
    assert generate_countdown("test", 0, count=50) == generate_countdown("test", 7, count=50)


BFCL = {
    "question": [[{"role": "user", "content": "Area of a triangle of base 10 and height 5?"}]],
    "function": [{"name": "area", "description": "", "parameters": {}}],
    "ground_truth": [
        {"area": {"base": [10, "ten"], "height": [5], "unit": ["cm", ""],
                  "at": [{"x": [1], "y": [2, ""]}]}},
    ],
}  # fmt: skip
XLAM = {
    "query": "Area?",
    "tools": json.dumps([{"name": "area"}]),
    "answers": json.dumps([{"name": "area", "arguments": {"base": 1}}]),
}
ROWS = {  # of each task, as published
    "countdown": COUNTDOWN,
    "math": {
        "problem": "One half?",
        "solution": "It is $\\boxed{\\frac{1}{2}}$.",
        "level": "1",
        "type": "Algebra",
    },
    "gsm8k": {
        "question": "How many?",
        "answer": "It is 500 * 2 = <<500*2=1000>>1,000.\n#### 1,000",
    },
    "mbpp": {
        "task_id": 700,
        "text": "Add.",
        "code": "def add(a, b):\r\n  return a + b",
        "test_list": ["assert add(1, 2) == 3"],
        "test_setup_code": "",
    },
    "humaneval": {
        "prompt": 'import math\n\ndef half(x):\n    """Half of x."""\n',
        "canonical_solution": "    return x / 2\n",
        "test": "def check(candidate):\n    assert candidate(3) == 1.5\n",
        "entry_point": "half",
    },
    "function_call": BFCL,
}
ROWS["mbpp_r"] = ROWS["mbpp"] | {"first_attempt": "def add(a, b):\n  return a - b"}


@pytest.mark.parametrize("name, row", [*ROWS.items(), ("function_call", XLAM)])
def test_a_few_shot_answer_is_right_and_the_prompt_shows_the_problem(name, row):
    task = TASKS[name]
    problem = json.loads(json.dumps(task.parse(row)))  # files of failures keep it so
    solution = task.solution(problem)
    assert task.verify(solution, problem) and task.answer(solution, problem) is not None
    for part in task.view.values():
        assert part(problem) in task.prompt(problem)
    assert not task.verify("", problem) and task.answer("", problem) is None


@pytest.mark.parametrize("name", TASKS)
def test_the_page_of_a_task_shows_a_row_its_prompt_and_a_right_answer(name):
    page = sys.modules[f"tasks.{name}"].__doc__.partition("\n\nrow:")[2]
    row, _, rest = page.partition("\nprompt:")
    prompt, _, answer = rest.partition("\nanswer:")
    task = TASKS[name]
    problem = json.loads(row[row.index("{") : row.rindex("}") + 1])
    problem = task.parse(problem) if task.parse else problem
    whole, shown = " ".join(task.prompt(problem).split()), " ".join(prompt.split())
    assert shown == whole or whole.startswith(shown.removesuffix("..."))
    answer = answer.partition("\n\n")[0].replace("\n" + " " * 9, "\n").strip()
    assert task.verify(answer, problem), answer


def test_the_form_that_a_prompt_for_calls_ends_in_is_no_answer_when_it_is_copied():
    task = TASKS["function_call"]
    problem = task.parse(ROWS["function_call"])
    for said in (task.prompt(problem), task.retry, task.rewrite):
        shown = said.splitlines()[-1]
        assert shown.startswith("[{") and task.answer(shown, problem) is None


@pytest.mark.parametrize("name", TASKS)
def test_no_text_makes_a_task_raise(name):
    task, rng = TASKS[name], random.Random(0)
    problem = task.parse(ROWS[name]) if name in ROWS else task.generate("train", 0)[0]
    pieces = ["<answer>", "</answer>", "</think>", "\\boxed{", "}", "#### ", "[", "]", "{"]
    pieces += ['"name": "area"', "]" * 9, "```", "```python\n", "bad ", "1", "+", "null", " "]
    pieces += ["\n", "\x00", "\ud800", "٣"]
    for _ in range(30 if task.published or name == "humaneval" else 300):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 12)))
        assert task.verify(text, problem) in (True, False)
        assert isinstance(task.answer(text, problem), str | None)


def test_a_program_can_not_replace_the_helpers_that_its_tests_use():
    prompt = 'def poly(x):\n    return x - 3\n\ndef zero():\n    """A zero of poly."""\n'
    test = "def check(candidate):\n    assert abs(poly(candidate())) < 1e-4"
    problem = {"prompt": prompt, "test": test, "entry_point": "zero"}
    assert TASKS["humaneval"].verify("def zero(): return 3", problem)
    assert not TASKS["humaneval"].verify("def poly(x): return 0\ndef zero(): return 9", problem)


def test_a_few_shot_call_has_the_first_accepted_values_and_nothing_optional():
    task = TASKS["function_call"]
    called = [{"name": "area", "arguments": {"base": 10, "height": 5, "at": {"x": 1}}}]
    assert json.loads(task.solution(task.parse(BFCL))) == called


def test_a_wrong_program_given_as_first_attempt_is_the_answer_of_the_first_turn():
    task = TASKS["mbpp_r"]
    problem = task.parse(ROWS["mbpp_r"])
    first = task.given(problem)
    assert "a - b" in task.answer(first, problem) and not task.verify(first, problem)


@pytest.mark.parametrize("name, change, field", [
    ("math", {"problem": ""}, "problem"),
    ("math", {"solution": ["1/2"]}, "solution"),
    ("gsm8k", {"answer": True}, "answer"),
    ("mbpp", {"task_id": "7a"}, "task_id"),
    ("mbpp", {"test_list": [1]}, "test_list"),
    ("mbpp_r", {"first_attempt": None}, "first_attempt"),
    ("humaneval", {"entry_point": 3}, "entry_point"),
    ("function_call", {"ground_truth": [{"area": {"base": 10}}]}, "ground_truth"),
    ("function_call", {"ground_truth": [{"a": {}, "b": {}}]}, "ground_truth"),
    ("function_call", {"question": [[], []]}, "question"),
    ("function_call", {"question": [[{"role": "user"}]]}, "question"),
    ("xlam", {"tools": "[{"}, "tools"),
    ("xlam", {"answers": '{"name": "area"}'}, "answers"),
    ("xlam", {"answers": '[{"name": "area"}]'}, "answers"),
    ("xlam", {"answers": [{"name": None, "arguments": {}}]}, "answers"),
    ("xlam", {"answers": [{"name": ["area"], "arguments": {}}]}, "answers"),
    ("xlam", {"answers": '[{"name": "area", "arguments": {"base": Infinity}}]'}, "answers"),
    ("function_call", {"ground_truth": [{"area": {"at": [{"x": 1}]}}]}, "ground_truth"),
    ("function_call", {"ground_truth": [{"area": {"at": [{"x": []}]}}]}, "ground_truth"),
])  # fmt: skip
def test_a_row_that_does_not_fit_its_schema_is_named_with_its_field(tmp_path, name, change, field):
    row = (XLAM if name == "xlam" else ROWS[name]) | change
    path = write(tmp_path / "data.jsonl", [row])
    with pytest.raises(ValueError, match=f"data.jsonl, line 1: field '{field}'"):
        load_task(flags(task="function_call" if name == "xlam" else name, data=path), ["train"])


def test_tests_of_a_row_that_can_not_judge_are_named_and_numpy_may_be_in_them_by_its_flag(tmp_path):
    tests = ["import numpy", "assert numpy.sum(add(1, 2)) == 3"]
    path = write(tmp_path / "data.jsonl", [ROWS["mbpp"] | {"test_list": tests}])
    with pytest.raises(ValueError, match="line 1: field 'test_list': .*numpy.*--code_numpy"):
        load_task(flags(task="mbpp", data=path), ["train"])
    task, splits = load_task(flags(task="mbpp", data=path, code_numpy=True, shots=0), ["train"])
    assert task.verify("def add(a, b): return a + b", splits["train"][0])
    path = write(tmp_path / "blank.jsonl", [ROWS["humaneval"] | {"test": "def check(c): c(3)"}])
    with pytest.raises(ValueError, match="field 'test': the tests assert nothing"):
        load_task(flags(task="humaneval", data=path), ["train"])
    with pytest.raises(ValueError, match="--code_timeout nan"):
        load_task(flags(code_timeout=float("nan")), ["train"])
    load_task(flags(), ["train"])  # as it was, for the tests after this one


def countdown_rows(count):
    return [{"nums": [n, 1], "target": n + 1, "solution": f"{n} + 1"} for n in range(1, count + 1)]


def test_a_files_splits_do_not_depend_on_order_or_format_and_do_not_overlap(tmp_path):
    rows = countdown_rows(60)
    lines = write(tmp_path / "a.jsonl", rows)
    reverse = write(tmp_path / "b.json", [json.dumps(rows[::-1], indent=1)])
    splits = load_task(flags(task="countdown", data=lines), SPLITS)[1]
    again = load_task(flags(task="countdown", data=reverse), SPLITS)[1]
    for name in SPLITS:
        assert splits[name] == again[name][::-1] and splits[name]
    placed = [problem for name in SPLITS for problem in splits[name]]
    assert sorted(p["target"] for p in placed) == [row["target"] for row in rows]


def test_named_files_are_their_splits_and_validation_is_a_tenth_of_train(tmp_path):
    train = write(tmp_path / "train.jsonl", countdown_rows(60))
    test = write(tmp_path / "test.jsonl", [OTHER])
    splits = load_task(flags(task="countdown", data=f"train={train},test={test}"), SPLITS)[1]
    assert splits["test"] == [OTHER] and len(splits["train"]) + len(splits["validation"]) == 60
    assert {split_of(countdown_key(p)) for p in splits["validation"]} == {"validation"}
    assert load_task(flags(task="countdown", data=f"test={test}"), ["test"])[1]["test"] == [OTHER]
    with pytest.raises(ValueError, match="none of its 1 problems is in the train split"):
        load_task(flags(task="countdown", data=f"test={test}"), ["train"])


def test_a_problem_in_two_splits_is_named_by_both_places(tmp_path):
    train = write(tmp_path / "a.jsonl", countdown_rows(3))
    test = write(tmp_path / "b.jsonl", [{"nums": [1, 2], "target": 3}])
    both = r"b.jsonl, line 1 \(test\) is the problem of .*a.jsonl, line 2 \(train\)"
    with pytest.raises(ValueError, match=both):
        load_task(flags(task="countdown", data=f"train={train},test={test}"), ["train"])


@pytest.mark.parametrize(
    "data", ["train=a.jsonl,tset=b.jsonl", "train=a.jsonl,train=b.jsonl", "train="]
)
def test_a_mistake_in_naming_splits_is_shown(tmp_path, data):
    data = data.replace("a.jsonl", write(tmp_path / "a.jsonl", [COUNTDOWN]))
    with pytest.raises(ValueError, match="is not SPLIT=SOURCE"):
        load_task(flags(task="countdown", data=data), SPLITS)


def test_mbpp_keeps_its_published_split_and_its_examples_are_in_none(tmp_path):
    numbers = (1, 2, 10, 11, 510, 511, 600, 601, 974)
    rows = [ROWS["mbpp"] | {"task_id": n, "text": f"Add {n}."} for n in numbers]
    task, splits = load_task(flags(task="mbpp", data=write(tmp_path / "mbpp.jsonl", rows)), SPLITS)
    ids = {name: [p["task_id"] for p in splits[name]] for name in SPLITS}
    assert ids == {"train": [601, 974], "validation": [511, 600], "test": [11, 510]}
    assert ["Add 1." in asked for asked, _ in task.shots] == [True, False, False]


def test_a_task_without_problems_of_its_own_says_where_to_get_some():
    for name in set(TASKS) - {"tiny", "countdown"}:
        with pytest.raises(ValueError, match=f"'{name}' has no problems of its own: give --data"):
            load_task(flags(task=name), ["test"])
    with pytest.raises(ValueError, match="'tiny' makes its own problems"):
        load_task(flags(data="mine.jsonl"), ["test"])
    with pytest.raises(ValueError, match="--shots_file mine.jsonl: task 'tiny' reads no rows"):
        load_task(flags(shots_file="mine.jsonl"), ["test"])


def test_few_shot_examples_leave_the_train_split_and_do_not_depend_on_the_seed(tmp_path):
    path = write(tmp_path / "a.jsonl", countdown_rows(60))
    task, splits = load_task(flags(task="countdown", data=path, shots=4), SPLITS)
    bare = load_task(flags(task="countdown", data=path), SPLITS)[1]
    shown = [p for p in bare["train"] if p not in splits["train"]]
    assert {asked for asked, _ in task.shots} == {task.prompt(p) for p in shown} and len(shown) == 4
    assert splits["test"] == bare["test"] and splits["validation"] == bare["validation"]
    one, other = (flags(task="countdown", shots=2, seed=seed) for seed in (0, 1))
    generated = load_task(one, ["validation"])[0].shots
    assert generated == load_task(other, ["validation"])[0].shots and len(generated) == 2


def test_a_file_of_examples_is_shown_with_its_own_responses_and_kept_out_of_every_split(tmp_path):
    path = write(tmp_path / "a.jsonl", countdown_rows(60))
    splits = load_task(flags(task="countdown", data=path), SPLITS)[1]
    own = splits["train"][0] | {"response": "I add. <answer>1 + 1</answer>"}
    examples = write(tmp_path / "shots.jsonl", [own, splits["train"][1]])
    task, left = load_task(flags(task="countdown", data=path, shots_file=examples), SPLITS)
    answers = [own["response"], task.solution(splits["train"][1])]
    assert [answer for _, answer in task.shots] == answers
    assert left["train"] == splits["train"][2:]
    taken = write(tmp_path / "taken.jsonl", [splits["test"][0]])
    with pytest.raises(ValueError, match="is a problem of the test split"):
        load_task(flags(task="countdown", data=path, shots_file=taken), ["train"])
    with pytest.raises(ValueError, match="--shots 5: .*shots.jsonl has 2 problems with a solution"):
        load_task(flags(task="countdown", data=path, shots_file=examples, shots=5), ["train"])


@pytest.mark.parametrize("prompts, message", [
    ({"first": "Make {target} of {nums}."},
     r"unknown placeholder \{nums\} in 'first'.*\{numbers\}, \{target\}"),
    ({"first": "Make something."}, "the model would see no problem"),
    ({"correct": "Was {target} right?"},
     r"unknown placeholder \{target\} in 'correct': it may have none"),
    ({"fix": "Again."}, "unknown key 'fix'"),
    ({"retry": ""}, "'retry' must be a text"),
    ({"system": "Make {target}."}, r"unknown placeholder \{target\} in 'system'"),
    (["retry"], "one JSON object"),
])  # fmt: skip
def test_a_mistake_in_a_file_of_prompts_is_shown(tmp_path, prompts, message):
    path = write(tmp_path / "prompts.json", [json.dumps(prompts, indent=1)])
    with pytest.raises(ValueError, match=message):
        load_task(flags(task="countdown", prompts=path), ["train"])


def test_prompts_of_a_file_replace_those_of_the_task(tmp_path):
    prompts = {"first": '{"x": 1} {target} from {numbers}', "retry": "Again."}
    prompts["system"] = "Be brief."
    path = write(tmp_path / "prompts.json", [prompts])
    task = load_task(flags(task="countdown", prompts=path), ["validation"])[0]
    assert task.prompt(COUNTDOWN) == '{"x": 1} 3 from 1, 2'
    assert task.retry == "Again." and task.correct == TASKS["countdown"].correct
    assert task.system == "Be brief."


def hub(monkeypatch, parts):
    """A stand-in for the package datasets that knows one name."""
    calls = []

    def load_dataset(*name):
        calls.append(name)
        if name == ("of/several",):
            raise ValueError("Config name is missing.\nPlease pick one of: ['main', 'socratic']")
        if name[0] != "there/data":
            raise OSError("no such\ndataset")
        return parts

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_a_hub_datasets_splits_are_kept_and_one_alone_is_split_by_content(monkeypatch):
    rows = countdown_rows(60)
    calls = hub(monkeypatch, {"train": rows[:50], "test": rows[50:]})
    splits = load_task(flags(task="countdown", data="hub:there/data:main"), SPLITS)[1]
    assert calls == [("there/data", "main")]
    assert splits["test"] == rows[50:] and len(splits["train"]) + len(splits["validation"]) == 50
    hub(monkeypatch, {"test": rows})
    splits = load_task(flags(task="countdown", data="hub:there/data"), SPLITS)[1]
    assert len(splits["train"]) > 30
    splits = load_task(flags(task="countdown", data="test=hub:there/data"), ["test"])[1]
    assert len(splits["test"]) == 60


def test_what_is_wrong_with_a_hub_dataset_is_one_line(monkeypatch):
    hub(monkeypatch, {"train": [{"nums": []}], "test": []})
    with pytest.raises(ValueError, match="hub:there/data, train row 1: field 'nums'"):
        load_task(flags(task="countdown", data="hub:there/data"), ["train"])
    with pytest.raises(ValueError, match="hub:elsewhere can't be loaded: no such dataset"):
        load_task(flags(task="countdown", data="hub:elsewhere"), ["train"])
    with pytest.raises(ValueError, match=r"pick one of: \[.*; name one, as in hub:of/several:main"):
        load_task(flags(task="countdown", data="hub:of/several"), ["train"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        load_task(flags(task="countdown", data="hub:there/data"), ["train"])


def test_lines_end_at_newlines_only(tmp_path):
    row = ROWS["math"] | {"problem": "a\u2028b\x85c"}
    path = write(tmp_path / "a.jsonl", [json.dumps(row, ensure_ascii=False)])
    assert [row["problem"] for _, row in read_rows(path)] == ["a\u2028b\x85c"]


DATA = Path(os.environ.get("DATA_DIR", Path(__file__).parents[2] / "shared" / "data"))
REAL = {  # train, validation, test
    "gsm8k": ("train={0}gsm8k_train.jsonl,test={0}gsm8k_test.jsonl", 1319),
    "math": ("test={0}math500.jsonl", 500),
    "mbpp": ("{0}mbpp.jsonl", 500),
    "humaneval": ("test={0}humaneval.jsonl", 164),
    "function_call": ("test={0}bfcl_parallel_multiple.jsonl", 200),
    "countdown": ("test={0}countdown3_test.jsonl", 200),
}


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the data, in DATA_DIR")
@pytest.mark.parametrize("name", REAL)
def test_published_files_are_read_whole_and_their_solutions_are_right(name):
    data, count = REAL[name]
    task, splits = load_task(flags(task=name, data=data.format(f"{DATA}/")), ["test"])
    assert len(splits["test"]) == count
    for problem in splits["test"][:: count // 10]:
        assert task.verify(task.solution(problem), problem)
