"""talk.py: what it prints is the conversation that an evaluation has, as it is sampled."""

import io
import json

import pytest
import torch

import evaluate
import helpers
import score
import talk
from helpers import ROOT, SMALL, refusal
from tasks import TASKS
from training import checkpoint
from training.batches import row_seeds
from training.flags import parse_args
from training.models import load_model

TINY = str(ROOT / "models" / "tiny")
WRONG, RIGHT = "11 5 10 make 22", "8 19 16 make 24"


def configured(*flags):
    return parse_args(talk.Config, ["--model", TINY, *flags])


def say(capsys, *args, typed=None, monkeypatch=None) -> str:
    if typed is not None:
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    talk.main(configured(*args))
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def model():
    return talk.load(TINY, TASKS["tiny"], configured())


def test_the_conversation_is_that_of_an_evaluation_with_its_verdicts(model, capsys, tmp_path):
    flags = ["--model", TINY, "--limit", "1", "--output", str(tmp_path / "out.json")]
    evaluate.main(parse_args(evaluate.Config, [*flags, "--temperature", "1"]))
    capsys.readouterr()
    (own,) = json.loads((tmp_path / "out.json").read_text())["conversations"]
    question = f"{' '.join(map(str, own['problem']['nums']))} make {own['problem']['target']}"
    (seed,) = row_seeds(1, "evaluate", 0)
    first, second = (f"{y['text']}  {talk.VERDICTS[y['right'] == 1]}" for y in own["attempts"])
    asked = (*model, question, configured("--temperature", "1"), seed)
    assert talk.heard(*asked) == [question, first, "fix", second]
    talk.converse(*asked, talk.aloud)
    lines = (("user", question), ("model", first), ("user", "fix"), ("model", second))
    assert capsys.readouterr().out == "".join(f"{who:<9}{text}\n" for who, text in lines)


def test_tokens_are_told_one_at_a_time_and_together_are_the_answer(model):
    told = []
    talk.converse(*model, RIGHT, configured(), 0, lambda *event: told.append(event))
    first = told[1 : told.index(("verdict", "right"))]
    assert told[0] == ("user", RIGHT) and {kind for kind, _ in first} == {"model"}
    assert len(first) > 9 and "".join(text for _, text in first) == "19 - 16 = 3 ; 3 * 8 = 24"


def test_half_a_letter_waits_for_its_other_half_and_no_more_than_that(model):
    class Bytes:
        def decode(self, ids, **_):
            return bytes(ids).decode("utf-8", "replace")

    class Sampler:
        tokenizer, is_stop = Bytes(), torch.zeros(256, dtype=torch.bool)

    told = []
    hear = talk.teller(Sampler, lambda _, text: told.append(text))
    for byte in "é!".encode() + "€".encode()[:2]:
        hear([0], [[byte]])
    assert told == ["", "é", "!", "", ""]


def test_after_a_right_answer_nothing_is_reflected_on(capsys):
    wrong, right = (say(capsys, q, "--method", "reflect_retry") for q in (WRONG, RIGHT))
    assert [line.split()[0] for line in wrong.splitlines()] == ["user", "model"] * 3
    assert [wrong.splitlines()[i] for i in (2, 4)] == ["user     reflect", "user     retry"]
    assert right == f"user     {RIGHT}\nmodel    19 - 16 = 3 ; 3 * 8 = 24  right\n"


def test_self_refine_goes_on_after_any_answer_and_its_critique_has_no_verdict(model):
    lines = talk.heard(*model, RIGHT, configured("--method", "self_refine"), 0)
    assert lines[::2] == [RIGHT, "reflect", "fix"] and lines[1].endswith("  right")
    assert not lines[3].endswith(("right", "wrong")) and lines[5].endswith(("right", "wrong"))


def test_what_the_limit_cuts_off_is_said(model):
    lines = talk.heard(*model, RIGHT, configured("--max_new_tokens", "4"), 0)
    assert lines[1] == "19 - 16 =  wrong (cut off)"


def test_without_a_question_it_asks_until_the_end_and_goes_on_after_a_bad_one(capsys, monkeypatch):
    said = say(capsys, typed=f"hello\n\n{RIGHT}\n", monkeypatch=monkeypatch)
    assert "> error: the model has no word for 'hello'\n> error: the question is empty\n>" in said
    assert said.endswith("24  right\n> \n")


def test_the_same_question_again_is_another_sample(capsys, monkeypatch):
    typed = f"{WRONG}\n" * 6
    said = say(capsys, "--temperature", "1", typed=typed, monkeypatch=monkeypatch)
    assert len({*said.split(f"> user     {WRONG}")[1:]}) > 1


def test_ctrl_c_ends_an_answer_and_not_the_talk(model, capsys, monkeypatch):
    def stop(*_):
        raise talk.Stopped(2)

    monkeypatch.setattr(talk, "converse", stop)
    assert say(capsys, typed="1\n2\n", monkeypatch=monkeypatch) == "> \n> \n> \n"


def test_two_models_stand_side_by_side(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one").symlink_to(TINY)
    helpers.save_random_model(tmp_path / "two")
    lines = say(capsys, WRONG, "--model", "one", "--beside", "two").splitlines()
    assert lines[:2] == [f"{'':<9}{'one':<55}two", f"{'user':<9}{WRONG:<55}{WRONG}"]
    left, right = lines[2][9:64].strip(), lines[2][64:]
    assert left == "5 + 11 = 16 ; 16 + 10 = 26  wrong" and right and right != left


def test_the_readmes_conversation_is_printed_and_judged_so(model, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    readme, names = (ROOT / "README.md").read_text(), ["models/tiny", "runs/score/checkpoint"]
    told = readme.partition("```\n")[2].partition("\n```")[0]
    assert f'talk.py --model {names[0]} --beside {names[1]} "{WRONG}"` prints' in readme
    after = [line[54:] for line in told.splitlines()[1:]]  # of a run that is not here
    assert told == talk.side_by_side(names, [talk.heard(*model, WRONG, configured(), 0), after])
    for said, verdict in (text.split("  ") for text in after[1::2]):
        right = TASKS["tiny"].verify(said, talk.asked(TASKS["tiny"], WRONG)[1])
        assert talk.VERDICTS[right] == verdict


def test_long_texts_stay_in_their_columns_and_empty_lines_stay(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    talks = [["a b c d e f", "x"], ["q\n\nr"]]
    assert talk.side_by_side(["one", "two"], talks).splitlines() == [
        "         one       two",
        "user     a b c d   q",
        "         e f",
        "                   r",
        "model    x",
    ]


def test_what_a_task_can_not_judge_has_no_verdict_and_goes_on(model):
    lines = talk.heard(*model, "8 make", configured("--method", "reflect_retry"), 0)
    assert lines[::2] == ["8 make", "reflect", "retry"]
    assert not any(text.endswith(("right", "wrong")) for text in lines)
    assert model[1].task.first == "{numbers} make {target}"  # nothing of the question stays


def test_a_question_fills_the_one_gap_of_a_tasks_prompt():
    task, problem, judges = talk.asked(TASKS["gsm8k"], "What is 2 + 2?")
    assert task.prompt(problem) == TASKS["gsm8k"].prompt({"problem": "What is 2 + 2?"})
    assert not judges and talk.asked(TASKS["mbpp"], "Sort {x}.")[0].first == "{question}"
    assert talk.asked(TASKS["mbpp_r"], "Sort.")[0].given is None
    nums = {"nums": [3, 4], "target": 7}
    assert talk.asked(TASKS["countdown"], " 3  4 make 7")[1:] == (nums, True)


def test_the_task_is_that_of_the_run_else_what_the_model_speaks(tmp_path):
    run, other = tmp_path / "run", helpers.save_other_model(tmp_path / "other")
    flags = ["--task", "countdown", "--output_dir", str(run), *SMALL, "--stage2_steps", "0"]
    score.main(parse_args(score.Config, [*flags, "--stage1_steps", "1", "--problems", "1"]))
    assert talk.task_for(configured("--model", str(run / "checkpoint"))).name == "countdown"
    config = configured("--model", str(run / "checkpoint"), "--task", "countdown")
    ours = configured("--model", str(run / "checkpoint"))
    talk.task_for(ours)  # and the limits are those of this task
    assert ours.max_new_tokens == config.max_new_tokens
    assert talk.task_for(configured()).name == "tiny"
    assert talk.task_for(configured("--task", "gsm8k")).name == "gsm8k"
    plain = talk.task_for(configured("--model", other))
    assert talk.asked(plain, "Why {x}?")[0].prompt({"question": "Why {x}?"}) == "Why {x}?"
    assert plain.correct == talk.WORDS["correct"]


def test_adapters_talk_as_their_merged_model_does(capsys, tmp_path):
    out = tmp_path / "run"
    few = "--stage1_steps 0 --stage2_steps 2 --problems 2 --lora_rank 2 --lr 0.1".split()
    helpers.train_here(score, TINY, out, *few)
    merged, tokenizer = load_model(str(out / "checkpoint"))
    checkpoint.save_model(merged, tokenizer, tmp_path / "merged")
    capsys.readouterr()
    told = [
        say(capsys, WRONG, "--model", str(m)) for m in (out / "checkpoint", tmp_path / "merged")
    ]
    assert told[0] == told[1] != say(capsys, WRONG)


def test_it_answers_from_the_command_line_without_a_terminal_in_bfloat16_too():
    done = helpers.from_command_line("talk.py", "--dtype", "bfloat16", *RIGHT.split())
    who = [line.split()[0] for line in done.stdout.splitlines() if line[:7] != "loading"]
    assert done.returncode == 0 and who == ["user", "model"] * 2


def test_bad_input_is_one_line(capsys):
    assert "has no word for 'hello'" in refusal(talk, capsys, "hello", "--model", TINY)
    assert "the question is empty" in refusal(talk, capsys, "", "--model", TINY)
    said = refusal(talk, capsys, RIGHT, "--model", TINY, "--attempts", "9")
    assert "don't fit the model's context" in said and said.count("\n") == 1
    assert "unknown flag --question" in refusal(talk, capsys, "--question", "1", "--model", TINY)
