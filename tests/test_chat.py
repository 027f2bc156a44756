"""Conversations on ids, with small tokenizers that have the real templates' shapes.

A conversation's ids are those of the first prompt, what was sampled, and the seams; they are
compared with the template's own encoding of the whole conversation.
"""

from datetime import datetime

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

import helpers
import tiny
from sampling.turns import begin, first_turn_ids, follow_up_ids, render, seam_ids
from tasks import TASKS
from tasks.env import Env

HEAD = "{% for m in messages %}"
CHATML = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
QWEN_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
)
LLAMA = (
    "<|begin|>{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n"
    "{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
GEMMA = (
    "<bos>{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<eot>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
QWEN3 = (  # an answer keeps its thoughts only after the last user message
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 < ns.last %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
)
THINK = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
IM = ("<|im_end|>", "<|im_start|>")
TEMPLATES = {  # template, its specials (the end of turn first), the seam around "fix"
    "chatml": (
        HEAD + CHATML + ASK,
        IM,
        "<|im_end|>\n<|im_start|>user\nfix<|im_end|>\n<|im_start|>assistant\n",
    ),
    "qwen with its system prompt": (
        QWEN_SYSTEM + HEAD + CHATML + ASK,
        IM,
        "<|im_end|>\n<|im_start|>user\nfix<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama3": (
        LLAMA,
        ("<|eot|>", "<|start|>", "<|end|>", "<|begin|>"),
        "<|eot|><|start|>user<|end|>\n\nfix<|eot|><|start|>assistant<|end|>\n\n",
    ),
    "gemma": (GEMMA, ("<eot>", "<turn>", "<bos>"), "<eot>\n<turn>user\nfix<eot>\n<turn>model\n"),
    "qwen3": (
        QWEN3 + ASK,
        IM,
        "<|im_end|>\n<|im_start|>user\nfix<|im_end|>\n<|im_start|>assistant\n",
    ),
    "qwen3 without thoughts": (
        QWEN3 + THINK,
        (*IM, "<think>", "</think>"),
        "<|im_end|>\n<|im_start|>user\nfix<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
}


def character_tokenizer(template, *special):
    letters = {c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    core = Tokenizer(models.BPE(letters, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(special))
    options = {"eos_token": str(special[0]), "chat_template": template}
    return PreTrainedTokenizerFast(tokenizer_object=core, **options)


def whole(tokenizer, *contents):
    """The template's own ids of a conversation that waits for the model."""
    roles = ("user", "assistant")
    chat = [{"role": roles[i % 2], "content": said} for i, said in enumerate(contents)]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False).input_ids


def sampled(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]


@pytest.mark.parametrize("name", TEMPLATES)
def test_seams_of_the_common_template_shapes(name):
    template, specials, seam = TEMPLATES[name]
    tokenizer = character_tokenizer(template, *specials)
    assert tokenizer.decode(seam_ids(tokenizer, "fix")) == seam


@pytest.mark.parametrize("name", [name for name in TEMPLATES if "without" not in name])
def test_turns_joined_on_ids_equal_the_templates_own_encoding(name):
    template, specials, _ = TEMPLATES[name]
    tokenizer = character_tokenizer(template, *specials)
    ids = first_turn_ids(tokenizer, "add 1 and 2", (("add 1 and 1", "2"),))
    assert ids == whole(tokenizer, "add 1 and 1", "2", "add 1 and 2")
    said = ["add 1 and 1", "2", "add 1 and 2"]
    for answer, message in (("4", "fix"), ("3", "sure?")):
        ids += sampled(tokenizer, answer)
        ids += follow_up_ids(tokenizer, message, ids[-1:])[0]
        said += [answer, message]
        assert ids == whole(tokenizer, *said)


def test_thoughts_that_a_template_would_strip_from_history_stay_as_they_were_sampled():
    template, specials, seam = TEMPLATES["qwen3"]
    tokenizer = character_tokenizer(template, *specials)
    thoughts = "<think>\n1+2\n</think>\n\n3"
    prompt, answer = first_turn_ids(tokenizer, "add"), sampled(tokenizer, thoughts)
    joined = prompt + answer + follow_up_ids(tokenizer, "fix", answer[-1:])[0]
    asked = "<|im_start|>user\nadd<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(joined) == asked + thoughts + seam
    assert joined != whole(tokenizer, "add", thoughts, "fix")  # the template strips them


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_that_was_cut_off_or_stopped_elsewhere_is_closed_at_the_seam(name):
    template, specials, _ = TEMPLATES[name]
    tokenizer = character_tokenizer(template, *specials)
    stopped, cut = follow_up_ids(tokenizer, "fix", [tokenizer.eos_token_id, 5])
    assert cut == [tokenizer.eos_token_id, *stopped] == seam_ids(tokenizer, "fix")


def test_the_tiny_tokenizers_turns_are_its_templates_too():
    tokenizer = tiny.build_tokenizer()
    answer = "16 / 8 = 2 ; 19 + 2 = 21"
    joined = first_turn_ids(tokenizer, "8 19 16 make 24") + sampled(tokenizer, answer)
    joined += follow_up_ids(tokenizer, "fix", joined[-1:])[0]
    assert joined == whole(tokenizer, "8 19 16 make 24", answer, "fix")


def test_a_base_model_without_a_template_gets_lines_with_examples_that_end_as_its_answers_must():
    tokenizer = character_tokenizer(None, "<eos>")
    prompt = first_turn_ids(tokenizer, "1+2", (("1+1", "2"),))
    assert tokenizer.decode(prompt) == "1+1\n2<eos>\n1+2\n"
    assert tokenizer.decode(seam_ids(tokenizer, "fix")) == "<eos>\nfix\n"
    parts = (first_turn_ids(tokenizer, "1+1"), sampled(tokenizer, "2"), seam_ids(tokenizer, "1+2"))
    assert prompt == parts[0] + parts[1] + parts[2][1:]


def test_a_systems_message_stands_before_the_examples_in_place_of_the_templates_own():
    tokenizer = character_tokenizer(TEMPLATES["qwen with its system prompt"][0], *IM)
    shots = (("1+1", "2"),)
    prompt = tokenizer.decode(first_turn_ids(tokenizer, "1+2", shots, system="Be brief."))
    own = tokenizer.decode(first_turn_ids(tokenizer, "1+2", shots))
    assert prompt == own.replace("You help.", "Be brief.") != own
    bare = character_tokenizer(None, "<eos>")
    prompt = first_turn_ids(bare, "1+2", shots, system="Be brief.")
    assert bare.decode(prompt) == "Be brief.\n\n1+1\n2<eos>\n1+2\n"


def test_a_template_that_would_leave_out_the_systems_message_is_refused():
    users = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    tokenizer = character_tokenizer(users, "<e>")
    assert first_turn_ids(tokenizer, "add")
    with pytest.raises(ValueError, match="leaves out the system's message"):
        first_turn_ids(tokenizer, "add", system="Be brief.")


def test_a_tokenizer_or_template_that_cannot_hold_a_conversation_is_refused():
    tokenizer = character_tokenizer(None, "<eos>")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a chat template nor an eos token"):
        seam_ids(tokenizer, "fix")
    users = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    tokenizer.chat_template = users
    with pytest.raises(ValueError, match="leaves out what the model said"):
        seam_ids(tokenizer, "fix")


@pytest.mark.parametrize("template, fault", [
    ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate$"),
    ("{% if %}", "Expected an expression"),
    ("{{ messages[7].content }}", "no element 7"),
    ("{{ 1 / 0 }}", "division by zero"),
    ("{{ 'a' + 1 }}", "can only concatenate"),
])  # fmt: skip
def test_a_template_that_fails_is_one_line(template, fault):
    tokenizer = character_tokenizer(template, "<e>")
    for ids in (seam_ids, first_turn_ids):
        with pytest.raises(ValueError, match=f"the chat template can't be used: .*{fault}"):
            ids(tokenizer, "fix")


LAST = "{% for m in messages %}{{ m.content }}<e>{% endfor %}"
LLAMA_DATE = (
    "{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n"
    '        {%- set date_string = strftime_now("%d %b %Y") %}\n    {%- else %}\n'
    '        {%- set date_string = "26 Jul 2024" %}\n    {%- endif %}\n{%- endif %}\n'
    '{{- "Today Date: " + date_string + "\n\n" }}'
)
DATED = {  # template, what stands before "add<e>" on 5 March 2031 at 7:08:09
    "{{ strftime_now('%d %b %Y') }} ": "05 Mar 2031 ",
    LLAMA_DATE: "Today Date: 05 Mar 2031\n\n",
    "{%- macro system() -%}{{ 'Now: ' + strftime_now(\"%Y-%m-%d\") + '.' }}{%- endmacro -%}"
    "{{ system() }}": "Now: 2031-03-05.",
    "{% if strftime_now('%M') | int % 2 %}odd{% else %}even{% endif %}": "even",
    "{% set form = '%-d. %B ' + '%y' %}{{ strftime_now(format=form) }}": "5. March 31",
    "{{ strftime_now('%H:%M:%S %j %%d 100%%') }}": "07:08:09 064 %d 100%",
    "\n  {% if true %}\n  {{ strftime_now('%y') }}\n  {% endif %}\n": "\n  31\n",
}


@pytest.mark.parametrize("template", DATED)
def test_a_template_that_prints_the_date_prints_the_day_it_is_given(template, monkeypatch):
    tokenizer, day = character_tokenizer(template + LAST, "<e>"), "2031-03-05T07:08:09"
    assert render(tokenizer, [("user", "add")], day) == DATED[template] + "add<e>"
    clock = type("Clock", (datetime,), {"now": lambda: datetime.fromisoformat(day)})
    monkeypatch.setattr(chat_template_utils, "datetime", clock)  # as if run on that day
    assert first_turn_ids(tokenizer, "add", day=day) == whole(tokenizer, "add")


def test_a_template_that_prints_no_date_says_the_same_every_day():
    fixed = "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    tokenizer = character_tokenizer(fixed + "{{ date_string }}, %d " + LAST, "<e>")
    days = "2031-03-05T07:08:09", "2031-03-06T07:08:09"
    assert {render(tokenizer, [("user", "1")], day) for day in days} == {"26 Jul 2024, %d 1<e>"}


def test_all_that_an_env_says_is_of_its_day(monkeypatch):
    dated = "{% for m in messages %}<u>{{ strftime_now('%d') }} {{ m.content }}<e>{% endfor %}"
    tokenizer = character_tokenizer(dated, "<e>", "<u>")
    helpers.on_day(monkeypatch, "2031-03-05")
    env, later = Env(TASKS["tiny"], tokenizer), Env(TASKS["tiny"], tokenizer, "2031-03-06T00:00:00")
    helpers.on_day(monkeypatch, "2031-03-07")
    rollout = type("Rollout", (), {"last_ids": lambda: [tokenizer.eos_token_id]})
    for one, day in ((env, "05"), (later, "06")):
        (prompt,) = one.prompts([{"nums": [1, 2, 3], "target": 6}])
        assert tokenizer.decode(prompt) == f"<u>{day} 1 2 3 make 6<e>"
        assert tokenizer.decode(one.seam("retry")) == f"<e><u>{day} retry<e>"
        for message in ("retry", ["retry"]):
            assert tokenizer.decode(one.follow_up(rollout, message)[0]) == f"<u>{day} retry<e>"


def adding_tokenizer(added: str, eos: str | AddedToken = "<e>"):
    """Without a template; it puts `added` around every text $A."""
    tokenizer = character_tokenizer(None, eos, "<b>", "<s>")
    core = tokenizer.backend_tokenizer
    used = [(name, core.token_to_id(name)) for name in ("<e>", "<b>", "<s>") if name in added]
    core.post_processor = processors.TemplateProcessing(single=added, special_tokens=used)
    return tokenizer


@pytest.mark.parametrize("added, bos", [
    ("$A", ""), ("<b> $A", "<b>"), ("<b> $A <e>", "<b>"), ("$A <e>", ""), ("<e> $A <e>", "<e>"),
    ("<b> $A <s>", "<b>"), ("<b> $A <e> <s>", "<b>"), ("<b> <s> $A <e> <e>", "<b><s>"),
])  # fmt: skip
def test_what_a_tokenizer_appends_is_not_said_before_an_answer(added, bos):
    tokenizer = adding_tokenizer(added)
    shots = (("1+1", "2"), ("1+2<e>", "3"))
    said = "1+1\n2<e>\n1+2<e>\n3<e>\n"
    for message in ("2+2", "<b>2+2", "2+2<e>", "2+2<e><e>", "<s>"):
        prompt = first_turn_ids(tokenizer, message, shots)
        assert tokenizer.decode(prompt) == f"{bos}{said}{message}\n"
    assert tokenizer.decode(seam_ids(tokenizer, "fix")) == "<e>\nfix\n"


def test_an_eos_that_ends_the_prompts_own_text_stays():
    tokenizer = adding_tokenizer("<b> $A <e>", AddedToken("<e>", rstrip=True, special=True))
    prompt = first_turn_ids(tokenizer, "say <e>")  # which takes in the newline after it
    assert tokenizer.decode(prompt) == "<b>say <e>"


@pytest.mark.parametrize("added, bos", [
    ("$A", []), ("<b> $A", [1]), ("<b> $A <e>", [1]), ("$A <e>", []),
])  # fmt: skip
def test_a_text_of_no_tokens_is_what_every_text_begins_with(added, bos):
    core = Tokenizer(models.WordLevel({"<unk>": 0, "<b>": 1, "<e>": 2, "a": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    used = [(name, core.token_to_id(name)) for name in ("<b>", "<e>") if name in added]
    core.post_processor = processors.TemplateProcessing(single=added, special_tokens=used)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>")
    assert begin(tokenizer, " \n") == begin(tokenizer, "") == bos
    assert begin(tokenizer, "a ") == [*bos, 3]
    assert begin(tokenizer, "<b>\n") == [*bos, 1]
