import json

import pytest

import tiny
from tasks import (
    TASKS,
    content_hash,
    countdown_problems,
    enumerate_steps,
    first_turn_ids,
    follow_up_ids,
    get_task,
    read_jsonl,
    seam_ids,
    tiny_splits,
)
from verifiers import run_steps


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.build_tokenizer()


def test_splits_are_disjoint_whatever_the_order_of_the_numbers():
    seen = [{content_hash(p) for p in split} for split in tiny_splits().values()]
    assert [len(s) for s in seen] == [1500, 1500, 13004]
    assert sum(len(s) for s in seen) == len(set.union(*seen))
    assert content_hash({"nums": [3, 1, 2], "target": 6}) == content_hash({"nums": [1, 2, 3], "target": 6})


def test_generated_countdown_splits_are_disjoint_for_any_seeds():
    train, test = (countdown_problems(s, None, seed, count=300) for s, seed in (("train", 0), ("test", 1)))
    assert not {content_hash(p) for p in train} & {content_hash(p) for p in test}
    assert train == countdown_problems("train", None, 0, count=300)


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


def test_turns_joined_on_ids_equal_the_chat_template_of_the_whole_conversation(tokenizer):
    first = first_turn_ids(tokenizer, "8 19 16 make 24")
    answer = tokenizer("16 / 8 = 2 ; 19 + 2 = 21 <end>", add_special_tokens=False).input_ids
    chat = [("user", "8 19 16 make 24"), ("assistant", "16 / 8 = 2 ; 19 + 2 = 21"), ("user", "fix")]
    whole = tokenizer.apply_chat_template(
        [{"role": r, "content": c} for r, c in chat], add_generation_prompt=True, tokenize=False
    )
    joined = first + answer + follow_up_ids(tokenizer, "fix", answer[-1:])[0]
    assert joined == tokenizer(whole, add_special_tokens=False).input_ids


def test_an_answer_that_was_cut_off_or_stopped_elsewhere_is_closed_at_the_seam(tokenizer):
    stopped, cut = follow_up_ids(tokenizer, "fix", [tokenizer.eos_token_id, tokenizer("=").input_ids[0]])
    assert cut == [tokenizer.eos_token_id, *stopped]


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_the_newline_after_the_end_of_turn_belongs_to_the_seam():
    tokenizer = character_tokenizer("<|im_start|>", "<|im_end|>")
    tokenizer.chat_template = CHATML
    seam = tokenizer.decode(seam_ids(tokenizer, "fix"))
    assert seam == "<|im_end|>\n<|im_start|>user\nfix<|im_end|>\n<|im_start|>assistant\n"


def test_a_base_model_without_a_template_gets_plain_lines():
    tokenizer = character_tokenizer("<|im_start|>", "<|im_end|>")
    assert tokenizer.decode(first_turn_ids(tokenizer, "add")) == "add\n"
    assert tokenizer.decode(seam_ids(tokenizer, "fix")) == "<|im_end|>\nfix\n"


def character_tokenizer(*special):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    core = Tokenizer(models.BPE(letters, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=special[-1])


def test_an_unknown_task_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown task 'sudoku'.*tiny"):
        get_task("sudoku")


@pytest.mark.parametrize("line, message", [
    ("{", "line 2: not JSON"), ('{"nums": [1, 2]}', "line 2: field 'target'"), ("[]", "line 2: field 'nums'"),
])  # fmt: skip
def test_a_bad_line_of_data_is_named_by_file_line_and_field(tmp_path, line, message):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"nums": [1, 2], "target": 3}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=f"data.jsonl, {message}"):
        read_jsonl(str(path), {"nums": list, "target": int})


TEMPLATES = {  # template, its specials (the end of turn first), and the seam around "fix"
    "llama3": (
        "{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}",
        ("<|eot|>", "<|start|>", "<|end|>"),
        "<|eot|><|start|>user<|end|>\n\nfix<|eot|><|start|>assistant<|end|>\n\n",
    ),
    "gemma": (
        "{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<eot>\n"
        "{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}",
        ("<eot>", "<turn>", "<eos>"),
        "<eot>\n<turn>user\nfix<eot>\n<turn>model\n",
    ),
    "strips thoughts": (
        "{% for m in messages %}<im>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<eot>\n{% endfor %}"
        "{% if add_generation_prompt %}<im>assistant\n{% endif %}",
        ("<eot>", "<im>"),
        "<eot>\n<im>user\nfix<eot>\n<im>assistant\n",
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_seams_of_the_common_template_shapes(name):
    template, specials, seam = TEMPLATES[name]
    tokenizer = character_tokenizer(*specials)
    tokenizer.chat_template = template
    assert tokenizer.decode(seam_ids(tokenizer, "fix")) == seam


def test_held_out_countdown_problems_do_not_depend_on_the_seed():
    assert countdown_problems("test", None, 0, count=50) == countdown_problems("test", None, 7, count=50)


@pytest.mark.parametrize("nums", ["[]", '[1, "a"]', "[0, 2]", "[true, 2]"])
def test_numbers_that_are_none_are_named(tmp_path, nums):
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"nums": {nums}, "target": 3}}\n')
    with pytest.raises(ValueError, match="problem 1: field 'nums'"):
        countdown_problems("train", str(path), 0)
