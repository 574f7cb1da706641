"""Prompts: chat templates and their manners, plain text, and no system turn unasked."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from reasonrl.prompts import render, render_text, with_system
from reasonrl.records import InputError

TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}/{% endfor %}"
OPEN = "{% if add_generation_prompt %}[assistant]{% endif %}"
DEFAULT = "{% if messages[0].role != 'system' %}[system]be nice/{% endif %}"
STRICT = (
    "{% for m in messages %}{% if loop.index0 % 2 == 1 and m.role != 'assistant' or "
    "loop.index0 % 2 == 0 and m.role == 'assistant' %}{{ raise_exception('turns must alternate') }}"
    "{% endif %}[{{ m.role }}]{{ m.content }}/{% endfor %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
)
MERGED = (  # the system text stands inside the first user turn
    "{% for m in messages %}{% if loop.first %}<<system: be nice>>{% endif %}"
    "[{{ m.role }}]{{ m.content }}/{% if loop.last %}{{ messages|length }}{% endif %}{% endfor %}"
)


def tokenizer(template=None, bos="<s>"):
    letters = "".join(chr(c) for c in range(32, 127)) + "\n"
    core = Tokenizer(
        models.WordLevel(
            {"<s>": 0, "<unk>": 1, **{c: i + 2 for i, c in enumerate(letters)}}, "<unk>"
        )
    )
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, unk_token="<unk>")
    made.chat_template = template
    return made


def text(chat, prompt, **options):
    return render_text(tokenizer(chat), prompt, **options)[0]


@pytest.mark.parametrize("first", ["", DEFAULT, "{{ bos_token }}", "{{ bos_token }}" + DEFAULT])
def test_no_system_turn_unless_asked(first):
    bos = "<s>" if "bos" in first else ""
    template = first + TURNS + OPEN
    assert text(template, "1+1") == f"{bos}[user]1+1/[assistant]"
    assert text(template, "1+1", system="S") == f"{bos}[system]S/[user]1+1/[assistant]"
    talk = [
        {"role": r, "content": c} for r, c in zip(("user", "assistant", "user"), "abc", strict=True)
    ]
    assert text(template, talk) == f"{bos}[user]a/[assistant]b/[user]c/[assistant]"
    own = [{"role": "system", "content": "S"}, *talk]
    assert text(template, own).startswith(f"{bos}[system]S/[user]a/")
    assert text(template, own, system="T").startswith(f"{bos}[system]S\n\nT/[user]a/")


def test_templates_that_insist_on_alternating_turns():
    assert text(DEFAULT + STRICT + OPEN, "1+1") == "[user]1+1/[assistant]"


def test_a_default_system_text_that_cannot_be_cut_off_is_an_error():
    with pytest.raises(InputError, match="system turn that cannot be told apart"):
        text(MERGED, "1+1")
    assert "[system]S/" in text(MERGED, "1+1", system="S")


def test_what_a_template_refuses_is_an_input_error():
    with pytest.raises(InputError, match=r"refuses turns \(system, user\): no system role"):
        text(NO_SYSTEM + TURNS + OPEN, "1+1", system="S")
    assert text(NO_SYSTEM + TURNS + OPEN, "1+1") == "[user]1+1/[assistant]"


def test_without_a_template_the_prompt_is_plain_text():
    talk = [{"role": "system", "content": "S"}, {"role": "user", "content": "1+1"}]
    assert text(None, "1+1=") == "1+1="
    assert text(None, talk) == "S\n1+1\n"
    assert text(None, "1+1", system="S") == "S\n1+1\n"
    assert text(TURNS, "1+1=", template=False) == "1+1="
    with pytest.raises(InputError, match="no chat template"):
        text(None, "1+1", template=True)


def test_ids_are_the_tokens_of_the_text():
    words = tokenizer(DEFAULT + TURNS + OPEN)
    ids = render(words, "7+1")
    assert words.decode(ids) == "[user]7+1/[assistant]"
    assert render(words, "7+1", template=False) == words("7+1")["input_ids"]


def test_content_in_parts_is_read_as_text():
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    assert text(None, parts) == "what?\n"


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([], "expected a message, got an empty list"),
        ([{"role": "user"}], "message 0: expected role and content"),
        (["hello"], "message 0: expected role and content, got 'hello'"),
        ([{"role": "user", "content": 3}], "message 0: expected role and content"),
        ("", "expected some text, got none"),
        ("caf\u00e9", "no token for a part of 'caf\u00e9'"),
    ],
)
def test_bad_prompts_are_named(prompt, message):
    with pytest.raises(InputError, match=message):
        render(tokenizer(), prompt)


def test_with_system_leaves_the_messages_alone():
    talk = [{"role": "user", "content": "a"}]
    assert with_system(talk, None) == talk
    assert with_system(talk, "S")[0] == {"role": "system", "content": "S"} and len(talk) == 1
