"""Segments: spans cover the text, tokens fall into their step, offsets are exact."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from reasonrl.records import Step
from reasonrl.segment import (
    _prefix_pieces,
    answer_span,
    decode,
    pieces,
    split_steps,
    think_span,
    token_steps,
)


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level BPE with merges of ASCII only, so that other characters split over tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|end|>"]
    )
    core.train_from_iterator(["the answer is 12 and the sum is the answer"] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")
    tokenizer.add_tokens(["<think> é"])  # an added token outside the byte alphabet
    return tokenizer


@pytest.fixture(scope="module")
def characters():
    core = Tokenizer(models.WordLevel({"<eos>": 0, **{c: i + 1 for i, c in enumerate("0123=\n")}}))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def parts(text, delimiter="\n"):
    return [text[s.start : s.end] for s in split_steps(text, delimiter)]


@pytest.mark.parametrize(
    "text, delimiter, expected",
    [
        ("", "\n", []),
        ("\n \n", "\n", []),
        ("one", "\n", ["one"]),
        ("one\ntwo\n", "\n", ["one\n", "two\n"]),
        ("one\n\n\ntwo", "\n", ["one\n\n\n", "two"]),
        ("one\n  \ntwo", "\n", ["one\n  \n", "two"]),
        ("\n\none\ntwo", "\n", ["\n\none\n", "two"]),
        ("a;;b;", ";", ["a;;", "b;"]),
        ("a\n\nb\nc\n\n\n\nd", "\n\n", ["a\n\n", "b\nc\n\n\n\n", "d"]),
        ("one\n ", "\n", ["one\n "]),
    ],
)
def test_steps_end_with_their_delimiter(text, delimiter, expected):
    assert parts(text, delimiter) == expected


@settings(max_examples=200, deadline=None)
@given(st.text("a \n;", max_size=30), st.sampled_from(["\n", ";", "\n\n"]))
def test_steps_cover_the_text_and_none_is_blank(text, delimiter):
    steps = parts(text, delimiter)
    assert "".join(steps) == (text if text.replace(delimiter, "").strip() else "")
    assert all(step.replace(delimiter, "").strip() for step in steps)


def test_an_empty_delimiter_is_refused():
    with pytest.raises(ValueError, match="delimiter must be a non-empty string"):
        split_steps("a", "")


def test_think_and_answer_spans():
    text = "<think>a</think> b </think><answer>1</answer><answer>2</answer><answer>3"
    inside = think_span(text)
    assert inside is not None and text[slice(*inside)] == "a"
    inside = answer_span(text)
    assert inside is not None and text[slice(*inside)] == "2"
    assert think_span("a</think>b") is None and think_span("a</think>b", opened=True) == (0, 1)
    assert think_span("<think>a") is None and think_span("</think><think>") is None
    assert answer_span("</answer>3<answer>") is None and answer_span("<answer>3") is None
    assert answer_span("<answer></answer>") == (8, 8)


def test_a_token_belongs_to_the_step_of_its_first_character():
    steps = [Step(0, 3), Step(3, 6), Step(8, 10)]
    # tokens: "ab" "cd" (straddles) "ef" "gh" (gap) "i" (gap|third: none of gap) "j", then EOS
    assert token_steps(steps, [0, 2, 4, 6, 8, 9, 10, 10]) == [0, 0, 1, -1, 2, 2, 2]
    # straddling a gap: the first character that lies in any step counts
    assert token_steps(steps, [0, 6, 9, 10]) == [0, 2, 2]
    assert token_steps(steps, [0, 7, 7, 10]) == [0, -1, 2]


def test_tokens_without_width_follow_what_is_before_them():
    assert token_steps([Step(0, 2), Step(2, 4)], [0, 2, 2, 4, 4]) == [0, 0, 1, 1]
    assert token_steps([Step(0, 2)], [0, 0, 2, 2]) == [-1, 0, 0]
    assert token_steps([], [0, 3, 3]) == [-1, -1]
    assert token_steps([Step(0, 2)], [0]) == []
    assert token_steps([Step(0, 2)], [0, 2, 4, 4]) == [0, -1, -1]


def test_wrong_steps_and_pieces_are_refused():
    with pytest.raises(ValueError, match="in order and apart"):
        token_steps([Step(0, 4), Step(3, 6)], [0, 6])
    with pytest.raises(ValueError, match="must not decrease, got 3 then 2"):
        token_steps([Step(0, 4)], [0, 3, 2])


def test_offsets_of_plain_tokens(characters):
    ids = characters("1=2\n3")["input_ids"] + [0]
    assert decode(characters, ids) == "1=2\n3"
    assert pieces(characters, ids) == [0, 1, 2, 3, 4, 5, 5]
    assert pieces(characters, []) == [0]


def test_a_character_split_over_tokens_belongs_to_its_first_byte(byte_level):
    text = "aé€😀b"
    ids = byte_level(text)["input_ids"]
    assert len(ids) == 1 + 2 + 3 + 4 + 1
    assert pieces(byte_level, ids) == [0, 1, 2, 2, 3, 3, 3, 4, 4, 4, 4, 5]


@pytest.mark.parametrize("name", ["decode", "_decode"])
def test_a_tokenizer_with_a_way_of_its_own_is_asked(byte_level, monkeypatch, name):
    ids = byte_level("the answer , is 12")["input_ids"] + [byte_level.eos_token_id]
    assert decode(byte_level, ids) == byte_level.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    with monkeypatch.context() as patched:
        patched.setattr(byte_level, name, lambda *args, **options: "of this one")
        assert decode(byte_level, ids) == "of this one"
    own = {name: lambda *args, **options: "of its class"}
    monkeypatch.setattr(byte_level, "__class__", type("Other", (type(byte_level),), own))
    assert decode(byte_level, ids) == "of its class"


def test_special_tokens_have_no_width_and_added_ones_have(byte_level):
    end = byte_level.eos_token_id
    ids = [
        end,
        *byte_level("the answer<think> é is")["input_ids"],
        end,
        *byte_level("€")["input_ids"],
    ]
    text = decode(byte_level, ids)
    offsets = pieces(byte_level, ids)
    assert text == "the answer<think> é is€" and offsets[-1] == len(text)
    read = [text[a:b] for a, b in zip(offsets, offsets[1:], strict=False)]
    assert "".join(read) == text and read[0] == "" and "<think> é" in read
    assert [r for i, r in zip(ids, read, strict=True) if i == end] == ["", ""]


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
def test_offsets_of_any_text_match_decoding_every_prefix(byte_level, text):
    ids = byte_level(text)["input_ids"]
    whole = decode(byte_level, ids)
    offsets = pieces(byte_level, ids)
    assert len(offsets) == len(ids) + 1 and offsets[-1] == len(whole)
    if "\ufffd" not in text:
        assert offsets == _prefix_pieces(byte_level, ids, whole)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(1, 256), max_size=24))
def test_offsets_of_broken_bytes_stay_exact(byte_level, ids):
    """Any token sequence, also one that is no UTF-8: every character in exactly one token."""
    text = decode(byte_level, ids)
    offsets = pieces(byte_level, ids)
    assert offsets == sorted(offsets) and offsets[0] == 0 and offsets[-1] == len(text)
    for t in range(len(ids)):  # whole characters before a token are not moved by what follows
        settled = decode(byte_level, ids[:t])
        if not settled.endswith("\ufffd"):
            assert offsets[t] == len(settled)


def test_steps_of_a_real_completion(byte_level):
    ids = [*byte_level("the sum\nis 😀\nthe")["input_ids"], byte_level.eos_token_id]
    text = decode(byte_level, ids)
    steps = token_steps(split_steps(text), pieces(byte_level, ids))
    for t, step in enumerate(steps):
        before = decode(byte_level, ids[: t + 1]).rstrip("\ufffd")
        if t == len(ids) - 1:
            assert step == 2
        elif not before.endswith("\n") and "😀" not in before[-2:]:
            assert step == before.count("\n")
    assert steps == sorted(steps) and set(steps) == {0, 1, 2}


def test_ids_without_a_token_have_no_width(byte_level):
    """A model's vocabulary may be padded beyond its tokenizer's."""
    beyond = len(byte_level) + 5
    ids = [*byte_level("is")["input_ids"], beyond, *byte_level("é")["input_ids"]]
    text = decode(byte_level, ids)
    assert text == "isé"
    offsets = pieces(byte_level, ids)
    assert offsets[-1] == 3 and offsets[ids.index(beyond)] == offsets[ids.index(beyond) + 1] == 2
