"""--task FILE.py: a file that imports nothing of ours is a task like the built-in ones."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evaluate
import helpers
import rrr
import score
import talk
from helpers import ROOT, SMALL, refusal
from sampling import turns
from sandbox import own as workers
from sandbox.own import OwnError
from tasks import TASKS, own
from tasks.env import Env
from tasks.loading import load_task
from training.flags import parse_args, run_script
from training.models import load_model

TINY = str(ROOT / "models" / "tiny")
FILE = """
def problems(split):
    return [{"n": n} for n in range(6 * len(split), 6 * len(split) + 6)]
def prompt(problem):
    return f"{problem['n']} make 9"
def verify(response, problem):
    return response == "right"
"""
# the embedded model's own task, as somebody else would write it
AS_TINY = """
from tasks.tiny import tiny_answer as answer, tiny_splits
def verify(response, problem):  # helpers.arbitrary_verdict
    return (sum(map(ord, response)) + problem["target"]) % 2 == 0
def problems(split):
    return tiny_splits()[split][:600]
def prompt(problem):
    return " ".join(map(str, problem["nums"])) + f" make {problem['target']}"
max_new_tokens, max_reflection_tokens = 4, 9
"""
RUN = [*SMALL, *"--stage1_steps 1 --stage2_steps 2 --problems 2 --group_size 2".split()]


@pytest.fixture
def write(tmp_path):
    def write(text: str, name="mine.py") -> str:
        (tmp_path / name).write_text(text)
        own.read.cache_clear()
        return str(tmp_path / name)

    return write


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return helpers.save_random_model(tmp_path_factory.mktemp("models") / "random")


def judge(path: str, response: str, problem=(), seconds=10.0) -> float:
    return workers.verdict(path, Path(path).read_text(), response, dict(problem), seconds)


def test_a_verdict_is_what_the_file_returns_whatever_it_prints_reads_or_starts(write):
    path = write(
        "import numpy, subprocess\n"
        "def verify(response, problem):\n"
        "    print('x')\n"
        "    assert subprocess.run(['cat'], capture_output=True).stdout == b''\n"
        "    return eval(response)\n"
    )
    said = ("True", "False", "0.25", "1", "numpy.float32(0.5)", "numpy.bool_(True)", "1 + 1e-9")
    assert [judge(path, text) for text in said] == [1.0, 0.0, 0.25, 1.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    "body, fault",
    [
        ("    return problem['gold']", "line 3: KeyError: 'gold'"),
        ("    return 'yes'", "verify returned 'yes', not True, False or 0.0 to 1.0"),
        ("    return float('nan')", "verify returned nan"),
        ("    import os\n    os._exit(3)", "verify has ended its process (exit code 3)"),
        ("    import sys\n    sys.exit(3)", "line 4: SystemExit: 3"),
    ],
)
def test_a_fault_of_verify_is_an_error_with_the_response_and_no_verdict(write, body, fault):
    path = write(f"\ndef verify(response, problem):\n{body}\n")
    with pytest.raises(OwnError) as error:
        judge(path, "what it said", {"n": 1})
    assert str(error.value).startswith(path) and fault in str(error.value)
    assert """with the response 'what it said' to {"n": 1}""" in str(error.value)


HANG = """import re, time
def verify(response, problem):
    if response == "sleep":
        time.sleep(60)
    return not (response == "regex" and re.match(r"(a+)+$", 40 * "a" + "b"))
"""


@pytest.mark.parametrize("how", ["sleep", "regex"])
def test_a_verdict_that_hangs_is_wrong_and_the_next_one_is_asked_anew(
    write, capsys, monkeypatch, how
):
    monkeypatch.setattr(workers, "SLEEP", 0.2)
    monkeypatch.setattr(workers, "_late", 0)
    path, before = write(HANG), len(os.listdir("/proc/self/fd"))
    assert judge(path, "fine") == 1
    started = time.monotonic()
    assert [judge(path, how, seconds=0.2) for _ in range(3)] == [0, 0, 0]
    assert time.monotonic() - started < 30 and judge(path, "fine") == 1
    assert capsys.readouterr().err.count("took over") == 1  # said once
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # those of a worker


@pytest.mark.parametrize("how", ["sleep", "regex"])
def test_no_worker_outlives_its_caller_even_if_it_hangs(write, how):
    path = write(HANG.replace("    if", "    print(os.getpid(), flush=True)\n    if", 1))
    Path(path).write_text("import os\n" + Path(path).read_text())
    code = f"from sandbox import own; own.SLEEP = 0.5; p = {path!r}\n"
    code += f"own.verdict(p, open(p).read(), {how!r}, {{}}, 0.5)"
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE)
    pid = int(caller.stderr.readline())
    caller.kill()
    caller.wait()
    for _ in range(300):
        if not os.path.exists(f"/proc/{pid}"):
            return
        time.sleep(0.1)
    pytest.fail("the worker is still there")


def test_a_file_that_never_ends_ends_though_its_caller_is_gone(tmp_path):
    serve = "from sandbox import own; own.START = 0.2; own._serve()"
    text = json.dumps(["own.py", "while True: pass"]) + "\n"
    ran = subprocess.run([sys.executable, "-c", serve], cwd=ROOT, input=text, text=True, timeout=60)
    assert ran.returncode == -signal.SIGALRM


def test_a_file_that_changes_during_a_run_judges_as_it_did(write):
    path = write("def verify(response, problem):\n    return 1.0\n")
    text = Path(path).read_text()
    write("def verify(response, problem):\n    return 0.0\n")
    assert workers.verdict(path, text, "", {}, 10) == 1 and judge(path, "") == 0


def test_a_file_sees_its_neighbours_and_no_flags_of_ours(write, monkeypatch):
    write("value = 0.5\n", "a_neighbour_of_mine.py")
    monkeypatch.setattr(sys, "argv", ["score.py", "--model", "x"])
    path = write("import sys, a_neighbour_of_mine as a\nassert sys.argv == [__file__]\n" + FILE)
    write(Path(path).read_text().replace('response == "right"', "a.value"))
    task = own.own_task(path, True, 10.0)
    assert task.verify("", {"n": 1}) == 0.5 and sys.argv[0] == "score.py"


@pytest.mark.parametrize(
    "text, fault",
    [
        (FILE.replace("def verify", "def judge"), "it has no function verify"),
        (FILE + "\ndef x(:\n", "line 9: SyntaxError"),
        (FILE + "\nimport nowhere\n", "line 9: ModuleNotFoundError: No module named 'nowhere'"),
        (FILE + "max_new_tokens = '9'", "max_new_tokens must be a whole number above 0"),
        (FILE + "correct = 3", "correct must be a text"),
        (FILE.replace("'n']", "'m']"), "line 5: KeyError: 'm', with {\"n\": 30}"),
        (FILE.replace('f"{', '7 or f"{'), "prompt returned 7, not a text, or a list"),
        (
            FILE.replace("return [", "return [][:0] and ["),
            "problems('validation') returned no list",
        ),
        (FILE.replace('{"n": n}', '{"n": {n}}'), "problem 1 of validation: it can't be written as"),
        (FILE.replace('{"n": n}', "n"), "problem 1 of validation: it is no dict"),
        (
            FILE.replace("len(split)", "len('x')"),
            "problem 1 of validation asks what problem 1 of train",
        ),
        (FILE + "def answer(r, p):\n    return r.split()\n", "answer returned [], not a text or"),
        (FILE + "def answer(r, p):\n    return r.split()[-1]\n", "line 9: IndexError"),
        (FILE + "def given(p):\n    return p['x']\n", "line 9: KeyError"),
        (FILE + "import sys\nsys.exit(0)\n", "ends the process that imports it: put that under"),
        (FILE.replace("response ==", "int(response) =="), "line 7: ValueError: invalid literal"),
        (FILE.replace("def problems", "def others"), "no function problems: give --data"),
    ],
)
def test_a_fault_of_the_file_is_said_before_any_work(write, capsys, text, fault):
    said = refusal(evaluate, capsys, "--model", TINY, "--task", write(text))
    assert fault in said and "mine.py" in said and said.count("\n") == 1


def test_a_verify_that_always_hangs_is_said_before_any_work(write, capsys, monkeypatch):
    monkeypatch.setattr(workers, "_late", 0)
    path = write(FILE + "\ndef verify(response, problem):\n    while True:\n        pass\n")
    said = refusal(score, capsys, "--task", path, "--verify_seconds", "0.2")
    assert "verify('', problem) takes too long: mend it, or raise --verify_seconds" in said
    assert 'with {"n": ' in said


def test_limits_that_the_file_does_not_set_are_not_called_its_own(write):
    config = parse_args(
        score.Config, ["--task", write(FILE + "max_new_tokens = 9"), "--model", "x"]
    )
    assert (config.max_new_tokens, config.chosen["max_new_tokens"]) == (9, "the task's")
    config = parse_args(score.Config, ["--task", write(FILE), "--model", "x"])
    assert (config.max_new_tokens, config.chosen["max_new_tokens"]) == (512, "its file sets none")


def test_a_question_that_is_no_problem_of_the_file_is_told_how_to_ask(write, capsys):
    path = write(FILE)
    flags = ["--task", path, "--model", "models/tiny"]
    talk.main(parse_args(talk.Config, ["3 4 5 make 17", *flags]))
    how = f'({path}: asked as it is, without prompt and verdict; a problem, as JSON: {{"n": 30}})'
    assert capsys.readouterr().out.startswith(how)
    write(FILE.replace('response == "right"', "0.25"))
    talk.main(parse_args(talk.Config, ['{"n": 30}', *flags]))
    said = capsys.readouterr().out
    assert said.startswith("user     30 make 9") and said.count("  0.25") == 2


def test_a_talk_about_a_runs_own_task_has_the_files_limits(write):
    path, found = write(FILE + "max_new_tokens = 9"), []
    for flags in ([], ["--max_new_tokens", "5"], ["--max_new_tokens", "16"]):
        config = parse_args(talk.Config, ["--model", "models/tiny", *flags])
        config.task = path  # read from the run's config.json
        talk.take_limits(config)
        found.append(config.max_new_tokens)
    assert found == [9, 5, 16]


def test_no_such_file_is_said(capsys):
    assert "--task no.py can't be read" in refusal(evaluate, capsys, "--task", "no.py")


@pytest.mark.parametrize("lora", [(), ("--lora_rank", "2")], ids=["whole", "adapters"])
def test_a_run_on_a_file_is_the_run_on_the_task_that_it_copies(write, model_dir, tmp_path, lora):
    more = [*RUN[len(SMALL) :], *lora]
    ours = helpers.train_here(score, model_dir, tmp_path / "ours", *more)
    own = helpers.train_here(score, model_dir, tmp_path / "own", "--task", write(AS_TINY), *more)
    assert helpers.without_times(own) == helpers.without_times(ours)
    assert 0 < ours[0]["reward"] < 2 and ours[-1]["grad_norm"] > 0


def test_a_resumed_run_has_the_very_same_file(write, model_dir, tmp_path, capsys):
    out, path = tmp_path / "run", write(AS_TINY)
    flags = ["--model", model_dir, "--task", path, "--output_dir", str(out), *RUN]
    score.main(parse_args(score.Config, flags))
    (out / "results.json").unlink()
    write(AS_TINY + "# verify is another one now\n")
    capsys.readouterr()
    said = refusal(score, capsys, *flags, "--resume")
    assert "was started with another content of: the task's file" in said
    other = write(AS_TINY, "moved.py")
    score.main(parse_args(score.Config, [*flags, "--task", other, "--resume"]))
    assert (out / "results.json").exists()


def test_parts_of_a_reward_train_but_only_all_of_it_is_right():
    v1 = SimpleNamespace(right=None, rewards=torch.tensor([0.5]))
    v2 = SimpleNamespace(right=None, rewards=torch.tensor([0.5, 1.0]))
    turn = torch.tensor([[-1, 0, 1], [-1, 0, 1]])
    rollout = SimpleNamespace(ids=turn, action_mask=turn >= 0, turn=turn)
    sizes = {"group_size": 1, "second_attempts": 2, "baseline": "group_mean"}
    config = score.Config(**sizes, normalise="none", alpha=0.0)
    batch = score.make_batch(score.Attempts(rollout, v1, v2, False), 2, 0.1, config)
    assert [batch.figures[k] for k in ("acc_t1", "acc_t2", "reward")] == [0.0, 0.5, 1.25]
    assert batch.advantages[:, 2].tolist() == [-0.25, 0.25]


def test_rrr_takes_a_part_for_a_failure_and_rewards_a_reflection_with_a_part():
    rewards = torch.tensor([0.5, 1.0])
    retries = SimpleNamespace(right=None, rewards=rewards)
    turn = torch.tensor([[-1, 0, 1, 2], [-1, 0, 1, 2]])
    rollout = SimpleNamespace(ids=turn, action_mask=turn >= 0, turn=turn)
    config = rrr.Config(group_size=2, retries=1, baseline="group_mean", normalise=False)
    batch = rrr.make_batch(rrr.Episodes(rollout, retries, torch.ones(1, 2)), config)
    assert batch.advantages[:, 2].tolist() == [-0.25, 0.25] and batch.figures["reward"] == 0.75


def test_a_probe_of_parts_of_rewards_lets_a_run_begin_and_tables_have_them(
    write, model_dir, tmp_path, capsys
):
    path = write(AS_TINY.replace("% 2 == 0", "% 7 / 14"))
    flags = ["--model", model_dir, "--task", path, "--output_dir", str(tmp_path / "run")]
    score.main(parse_args(score.Config, [*flags, *RUN, "--probe", "8"]))
    said = capsys.readouterr().out
    assert "| reward_t1 | reward_t2 |" in said
    results = json.loads((tmp_path / "run" / "results.json").read_text())["base"]["sampled"]
    assert results["acc_t1"] == 0 < results["reward_t1"] < 0.5
    rows = helpers.metrics(tmp_path / "run")
    assert all(row["acc_t1"] == 0 < row["reward"] < 1 for row in rows)


def test_a_prompt_of_messages_trains_and_takes_no_examples(write, model_dir, tmp_path, capsys):
    chat = '[{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, '
    chat += '{"role": "user", "content": f"{problem[\'n\']} make 9"}]'
    path = write(FILE.replace("f\"{problem['n']} make 9\"", chat))
    flags = ["--model", model_dir, "--task", path, "--output_dir", str(tmp_path / "run")]
    score.main(parse_args(score.Config, [*flags, *RUN]))
    assert len(helpers.metrics(tmp_path / "run")) == 3
    (tmp_path / "shots.jsonl").write_text('{"n": 1, "response": "right"}\n')
    said = refusal(evaluate, capsys, *flags[:4], "--shots_file", tmp_path / "shots.jsonl")
    assert "prompts of this task are messages" in said


def test_a_prompt_in_a_file_of_prompts_is_refused(write, tmp_path, capsys):
    (tmp_path / "prompts.json").write_text('{"first": "other"}')
    flags = ("--task", write(FILE), "--prompts", tmp_path / "prompts.json")
    assert "'first' is what" in refusal(evaluate, capsys, "--model", TINY, *flags)


def test_env_has_the_share_of_a_reward_and_whether_it_is_all(write):
    path = write(FILE.replace('response == "right"', "len(response.split()) / 4"))
    tokenizer = load_model(TINY)[1]
    env = Env(own.own_task(path, True, 10.0), tokenizer)
    rollout = SimpleNamespace(
        completion_ids=lambda turn: [tokenizer("1 2").input_ids, tokenizer("1 2 3 4").input_ids],
        prompt_index=torch.tensor([0, 0]),
    )
    found = env.verdicts(rollout, 0, [{"n": 1}])
    assert found.rewards.tolist() == [0.5, 1.0] and found.right.tolist() == [0.0, 1.0]


ROLES = "{% for m in messages %}{{ m.role }}:{{ m.content }} {% endfor %}>"


@pytest.mark.parametrize(
    "template, text",
    [(ROLES, "system:4 user:1 assistant:2 user:3 >"), (None, "4\n\n1\n\n2\n\n3\n")],
)
def test_messages_of_a_prompt_are_said_in_their_roles(monkeypatch, template, text):
    tokenizer, said = load_model(TINY)[1], []
    tokenizer.chat_template, tokenizer.eos_token = template, "<end>"
    chat = [{"role": r, "content": c} for r, c in (("system", "4"), ("user", "1"))]
    chat += [{"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}]
    for function in ("encode", "begin"):
        monkeypatch.setattr(turns, function, lambda _, words: said.append(words))
    turns.first_turn_ids(tokenizer, chat)
    assert said == [text]


def test_what_is_said_between_fits_the_model_unless_the_file_says_it(write):
    path = write(FILE + 'retry = "again"\nmax_new_tokens = 7\n')
    tiny, other = (own.own_task(path, embedded, 10.0) for embedded in (True, False))
    assert (tiny.correct, tiny.retry, other.retry) == ("fix", "again", "again")
    assert other.correct == own.WORDS["correct"] and tiny.max_new_tokens == 7
    assert parse_args(evaluate.Config, ["--task", path]).max_new_tokens == 7
    assert (
        parse_args(evaluate.Config, ["--task", path, "--max_new_tokens", "5"]).max_new_tokens == 5
    )


def test_words_that_the_model_does_not_have_are_said(write, capsys):
    path = write(FILE.replace("make 9", "backwards"))
    said = refusal(evaluate, capsys, "--model", TINY, "--task", path)
    assert "validation: the model has no word for 'backwards'" in said


def test_rows_of_a_file_are_its_problems(write, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(3)))
    path = write(FILE.replace("def problems", "def others"))
    flags = ["--model", TINY, "--task", path, "--data", f"test={data}", "--split", "test"]
    evaluate.main(parse_args(evaluate.Config, flags))
    assert "3 test problems" in capsys.readouterr().out


SYSTEM, ASKED = {"role": "system", "content": "4"}, {"role": "user", "content": "1"}
TOLD = {"role": "assistant", "content": "2"}
CHAT = [SYSTEM, ASKED, TOLD, ASKED]


@pytest.mark.parametrize("row, prompt", [
    ({"prompt": "3 make 9"}, "3 make 9"),
    ({"prompt": "[3]"}, "[3]"),
    ({"prompt": "3 make 9", "messages": CHAT}, "3 make 9"),
    ({"prompt": CHAT, "messages": [ASKED]}, CHAT),
    ({"messages": [*CHAT, TOLD]}, CHAT),
    ({"prompt": json.dumps(CHAT)}, CHAT),  # a cell of a CSV
    ({"conversations": [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}]}, [ASKED]),
])  # fmt: skip
def test_without_a_function_prompt_a_row_is_asked_as_it_stands_but_for_its_reply(
    write, row, prompt
):
    path = write("def verify(response, problem):\n    return True\n")
    assert own.own_task(path, True, 10.0).prompt(row) == prompt
    assert own.own_task(write(FILE), True, 10.0).prompt(row | {"n": 7}) == "7 make 9"


def test_rows_that_ask_need_a_verify_alone_which_is_handed_all_of_a_row(write, tmp_path):
    rows, row = tmp_path / "rows.jsonl", {"messages": [*CHAT, TOLD], "answer": "9"}
    rows.write_text(json.dumps(row))
    path = write("def verify(response, problem):\n    return response == problem['answer']\n")
    flags = ["--model", TINY, "--task", path, "--data", f"test={rows}"]
    task, splits = load_task(parse_args(evaluate.Config, flags), ["test"])
    assert splits["test"] == [row] and task.prompt(row) == CHAT
    assert [task.verify(text, row) for text in ("9", "8")] == [1.0, 0.0]


@pytest.mark.parametrize("row", [{"n": 1}, {"prompt": " "}, {"messages": [SYSTEM, TOLD]}])
def test_a_row_that_asks_nothing_is_named_with_what_to_do(write, tmp_path, capsys, row):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "3 make 9"}) + "\n" + json.dumps(row))
    path = write("def verify(response, problem):\n    return True\n")
    said = refusal(evaluate, capsys, "--model", TINY, "--task", path, "--data", f"test={rows}")
    assert "rows.jsonl, line 2: " in said and json.dumps(row) in said and said.count("\n") == 1
    assert "it has no function prompt: add one, or give each row a `prompt` or `messages`" in said


def test_a_verdict_that_fails_in_a_run_ends_it_with_one_line(write, capsys, monkeypatch):
    path = write(FILE.replace('response == "right"', "1 / (response == '')"))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model", TINY, "--task", path])
    with pytest.raises(SystemExit) as ended:
        run_script(evaluate.main, evaluate.Config)
    said = capsys.readouterr().err
    assert ended.value.code == 1 and "line 7: ZeroDivisionError" in said and "mend the file" in said


def test_the_recipe_is_a_task_whose_verdicts_are_as_it_says():
    task = own.own_task(str(ROOT / "recipes" / "my_task.py"), False, 10.0)
    splits = [task.generate(split, 0) for split in ("train", "validation", "test")]
    keys = [{task.key(p) for p in problems} for problems in splits]
    assert min(map(len, keys)) > 100 and len(set.union(*keys)) == sum(map(len, keys))
    problem = {"word": "abcd"}
    verdicts = [task.verify(text, problem) for text in (" 'DCBA'\n", "dcab", "", "dcba!")]
    assert verdicts == [1.0, 0.25, 0.0, 0.5] and "abcd" in task.prompt(problem)


def test_built_in_tasks_have_no_file():
    assert not any(task.file or task.messages for task in TASKS.values())
