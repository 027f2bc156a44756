"""Conversations on ids, with small tokenizers that have the templates' real shapes."""

import pytest

import tiny
from chat import first_turn_ids, follow_up_ids, seam_ids


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.build_tokenizer()


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
