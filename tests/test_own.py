"""--task FILE.py: a file that imports nothing of ours is a task like the built-in ones."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import evaluate
import helpers
import score
from helpers import ROOT, SMALL, refusal
from sampling import turns
from sandbox import own as workers
from sandbox.own import OwnError
from tasks import TASKS, own
from tasks.env import Env
from training.flags import parse_args, run_script
from training.models import load_model

TINY = str(ROOT / "models" / "tiny")
FILE = """
def problems(split):
    return [{"n": n} for n in range(6)]
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
    return tiny_splits()[split]
def prompt(problem):
    return " ".join(map(str, problem["nums"])) + f" make {problem['target']}"
max_new_tokens, max_reflection_tokens = 4, 9
"""
RUN = [*SMALL, *"--stage1_steps 1 --stage2_steps 2 --problems 2 --group_size 2".split()]


@pytest.fixture
def write(tmp_path):
    def write(text: str, name="mine.py") -> str:
        (tmp_path / name).write_text(text)
        own.names_of.cache_clear()
        return str(tmp_path / name)

    return write


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return helpers.save_random_model(tmp_path_factory.mktemp("models") / "random")


def test_a_verdict_is_what_the_file_returns_whatever_it_prints(write):
    path = write("def verify(response, problem):\n    print('x')\n    return eval(response)\n")
    values = [workers.verdict(path, text, {}, 10) for text in ("True", "False", "0.25", "1")]
    assert values == [1.0, 0.0, 0.25, 1.0]


@pytest.mark.parametrize(
    "body, fault",
    [
        ("    return problem['gold']", "line 3: KeyError: 'gold'"),
        ("    return 'yes'", "verify returned 'yes', not True, False or 0.0 to 1.0"),
        ("    return float('nan')", "verify returned nan"),
        ("    import os\n    os._exit(3)", "verify has ended its process (exit code 3)"),
    ],
)
def test_a_fault_of_verify_is_an_error_with_the_response_and_no_verdict(write, body, fault):
    path = write(f"\ndef verify(response, problem):\n{body}\n")
    with pytest.raises(OwnError) as error:
        workers.verdict(path, "what it said", {"n": 1}, 10)
    assert str(error.value).startswith(path) and fault in str(error.value)
    assert """with the response 'what it said' to {"n": 1}""" in str(error.value)


def test_a_verdict_that_hangs_is_wrong_and_the_next_one_is_asked_anew(write, capsys):
    path = write(
        "import time\ndef verify(r, p):\n    time.sleep(60 * (r == 'hang'))\n    return 1\n"
    )
    assert workers.verdict(path, "fine", {}, 10) == 1
    started = time.monotonic()
    assert workers.verdict(path, "hang", {}, 0.3) == 0 and time.monotonic() - started < 10
    assert workers.verdict(path, "fine", {}, 10) == 1
    assert workers.verdict(path, "hang", {}, 0.1) == 0
    assert capsys.readouterr().err.count("took over") == 1  # said once


def test_no_worker_outlives_its_caller_even_if_it_hangs(write):
    said = "print(os.getpid(), flush=True)"
    path = write(f"import os, time\ndef verify(r, p):\n    {said}\n    time.sleep(60)\n")
    code = f"from sandbox.own import verdict; verdict({path!r}, '', {{}}, 60)"
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE)
    pid = int(caller.stderr.readline())
    caller.kill()
    caller.wait()
    for _ in range(100):
        if not os.path.exists(f"/proc/{pid}"):
            return
        time.sleep(0.1)
    pytest.fail("the worker is still there")


@pytest.mark.parametrize(
    "text, fault",
    [
        (FILE.replace("def verify", "def judge"), "it has no function verify"),
        (FILE + "\ndef x(:\n", "line 9: SyntaxError"),
        (FILE + "\nimport nowhere\n", "line 9: ModuleNotFoundError: No module named 'nowhere'"),
        (FILE + "max_new_tokens = '9'", "max_new_tokens must be a whole number above 0"),
        (FILE + "correct = 3", "correct must be a text"),
        (FILE.replace("'n']", "'m']"), "line 5: KeyError: 'm', with {\"n\": 0}"),
        (FILE.replace('f"{', '7 or f"{'), "prompt returned 7, not a text"),
        (FILE.replace("range(6)", "range(0)"), "problems('validation') returned no list"),
        (FILE.replace('{"n": n}', '{"n": {n}}'), "problem 1 of validation is no dict that can be"),
        (FILE.replace("response ==", "int(response) =="), "line 7: ValueError: invalid literal"),
        (FILE.replace("def problems", "def others"), "no function problems: give --data"),
    ],
)
def test_a_fault_of_the_file_is_said_before_any_work(write, capsys, text, fault):
    said = refusal(evaluate, capsys, "--model", TINY, "--task", write(text))
    assert fault in said and "mine.py" in said and said.count("\n") == 1


def test_no_such_file_is_said(capsys):
    assert "--task no.py: no such file" in refusal(evaluate, capsys, "--task", "no.py")


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


def test_parts_of_a_reward_train_but_only_all_of_it_is_right():
    v1 = SimpleNamespace(right=torch.tensor([0.0, 1.0]), rewards=torch.tensor([0.5, 1.0]))
    mask = torch.tensor([[False, True], [False, True]])
    rollout = SimpleNamespace(ids=mask.long(), action_mask=mask, turn=mask.long() - 1)
    config = score.Config(single_turn=True, group_size=2, normalise="none")
    batch = score.make_batch(score.Attempts(rollout, v1, None, False), 2, 0.1, config)
    assert batch.figures["acc_t1"] == 0.5 and batch.figures["reward"] == 0.75
    assert batch.advantages[:, 1].tolist() == [-0.5, 0.5]


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


def test_rows_of_a_file_are_its_problems(write, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(3)))
    path = write(FILE.replace("def problems", "def others"))
    flags = ["--model", TINY, "--task", path, "--data", f"test={data}", "--split", "test"]
    evaluate.main(parse_args(evaluate.Config, flags))
    assert "3 test problems" in capsys.readouterr().out


def test_a_verdict_that_fails_in_a_run_ends_it_with_one_line(write, capsys, monkeypatch):
    path = write(FILE.replace('response == "right"', "1 / (not response)"))
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
