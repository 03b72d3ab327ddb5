"""Captions of strangers: what is read, what is refused, and which one is shown."""

import json
from collections import Counter

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from flux.data.captions import (
    MAX_CAPTION_BYTES,
    MAX_JSON_BYTES,
    choose_caption,
    clean_captions,
    parse_json,
    parse_text,
)
from flux.data.errors import BadSample


def reason_of(parse, *args) -> str | None:
    try:
        parse(*args)
    except BadSample as error:
        assert error.detail and (error.key, error.shard) == ("", "")
        return error.reason
    return None


@pytest.mark.parametrize(
    "data, caption",
    [
        (b"a cat", "a cat"),
        (b"\xef\xbb\xbfa cat", "a cat"),
        (b"  a\tcat \r\n on\xc2\xa0a\xe3\x80\x80mat\n", "a cat on a mat"),
        ("eine Öl-Ölkatze 🐈".encode(), "eine Öl-Ölkatze 🐈"),
        ("a\x85cat\x1con\x0ba\x0cmat".encode(), "a cat on a mat"),  # controls that count as whitespace
        (b"", ""),
        (b" \n\t ", ""),
        (b"x" * MAX_CAPTION_BYTES, "x" * MAX_CAPTION_BYTES),
    ],
)
def test_text(data, caption):
    assert parse_text(data) == (caption,)


DAMAGED_TEXT = {
    "10 MB": b"cat " * 2_500_000,
    "one byte too long": b"x" * (MAX_CAPTION_BYTES + 1),
    "Latin-1": "Öl".encode("latin-1"),
    "UTF-16": "a cat".encode("utf-16"),
    "cut inside a character": "Ö".encode()[:1],
    "overlong form": b"\xc0\x80",
    "surrogate": b"\xed\xa0\x80",
    "NUL": b"a\0cat",
    "escape": b"\x1b[31mcat",
    "delete": b"cat\x7f",
    "first C1 control": "cat\x80".encode(),
    "C1 control before the line end": "cat\x84".encode(),
    "C1 control after the line end": "cat\x86".encode(),
    "last C1 control": "cat\x9f".encode(),
}


@pytest.mark.parametrize("name", DAMAGED_TEXT)
def test_damaged_text(name):
    assert reason_of(parse_text, DAMAGED_TEXT[name]) == "bad_caption"


@pytest.mark.parametrize(
    "entry, field, captions",
    [
        ({"text": "a cat"}, None, ("a cat",)),
        ({"caption": " a  cat\n"}, None, ("a cat",)),
        ({"caption": "second", "text": "first"}, None, ("first",)),
        ({"caption": "second", "text": None}, None, ("second",)),
        ({"text": "no", "title": "yes"}, "title", ("yes",)),
        ({"text": ["a", "", "b"]}, None, ("a", "", "b")),
        ({"text": ""}, None, ("",)),
        ({"text": "a cat", "score": float("nan"), "price": float("-inf")}, None, ("a cat",)),
        ({"text": "🐈", "width": 3, "more": {"deep": [1, 2.5, None]}}, None, ("🐈",)),
    ],
)
def test_json(entry, field, captions):
    assert parse_json(json.dumps(entry).encode(), field) == captions
    assert parse_json(b"\xef\xbb\xbf" + json.dumps(entry, ensure_ascii=False).encode(), field) == captions


DAMAGED_JSON = {
    "empty": (b"", "bad_caption"),
    "whitespace": (b" \n", "bad_caption"),
    "garbage": (b"<html>", "bad_caption"),
    "cut": (b'{"text": "a c', "bad_caption"),
    "not UTF-8": (b'{"text": "\xff"}', "bad_caption"),
    "NUL": (b'{"text": "a\\u0000cat"}', "bad_caption"),
    "half a character": (b'{"text": "\\ud800"}', "bad_caption"),
    "not a number": (b'{"text": NaN}', "bad_caption"),
    "infinity": (b'{"text": -Infinity}', "bad_caption"),
    "endless integer": (b'{"text": "a cat", "score": ' + b"9" * 10_000 + b"}", "bad_caption"),
    "deep lists": (b'{"text": ' + b"[" * 200_000, "bad_caption"),
    "deep objects": (b'{"text":' * 100_000, "bad_caption"),
    "too large": (b'{"text": "a cat"}' + b" " * MAX_JSON_BYTES, "bad_caption"),
    "caption too long": (json.dumps({"text": "x" * (MAX_CAPTION_BYTES + 1)}).encode(), "bad_caption"),
    "caption of too many bytes": (json.dumps({"text": "Ö" * (MAX_CAPTION_BYTES // 2 + 1)}).encode(), "bad_caption"),
    "a list": (b'["a cat"]', "bad_caption"),
    "a string": (b'"a cat"', "bad_caption"),
    "a number": (b'{"text": 3}', "bad_caption"),
    "an object": (b'{"text": {"en": "a cat"}}', "bad_caption"),
    "a list of lists": (b'{"text": [["a cat"]]}', "bad_caption"),
    "a list with null": (b'{"text": ["a cat", null]}', "bad_caption"),
    "missing": (b'{"title": "a cat"}', "no_caption"),
    "null": (b'{"text": null}', "no_caption"),
    "no captions": (b'{"text": []}', "no_caption"),
}


@pytest.mark.parametrize("name", DAMAGED_JSON)
def test_damaged_json(name):
    data, reason = DAMAGED_JSON[name]
    assert reason_of(parse_json, data, None) == reason


def test_a_configured_field_has_no_substitute():
    assert reason_of(parse_json, b'{"text": "a cat"}', "title") == "no_caption"


def test_the_message_says_what_is_wrong():
    with pytest.raises(BadSample, match="not UTF-8: invalid start byte at byte 4"):
        parse_json(b'{"a\\\xff', None)
    with pytest.raises(BadSample, match="the JSON has no text or caption"):
        parse_json(b"{}", None)


PARSERS = {"text": parse_text, "json": lambda data: parse_json(data, None), "field": lambda data: parse_json(data, "x")}
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["text", "caption", "x"]), inner),
    max_leaves=8,
)


@pytest.mark.parametrize("parser", PARSERS)
@given(data=st.binary() | VALUES.map(lambda value: json.dumps(value).encode()))
@example(data=b'{"text": "\\udc80 \\ud83d\\ude00"}')
def test_any_bytes_give_clean_captions_or_a_bad_sample(parser, data):
    try:
        captions = PARSERS[parser](data)
    except BadSample as error:
        assert error.reason in ("no_caption", "bad_caption")
        return
    assert captions
    for caption in captions:
        assert caption == " ".join(caption.split()) and len(caption.encode()) <= MAX_CAPTION_BYTES
        assert parse_text(caption.encode()) == (caption,)


def test_empty_captions_count_only_where_there_is_no_other():
    assert clean_captions(("", "a", "", "b"), "bad") == ("a", "b")
    assert clean_captions(("", "a"), "unconditional") == ("a",)
    assert clean_captions(("", ""), "unconditional") == ("",)
    assert clean_captions((), "unconditional") == ("",)
    assert reason_of(clean_captions, ("", ""), "bad") == "no_caption"
    assert reason_of(clean_captions, (), "bad") == "no_caption"


def test_all_captions_are_chosen_equally_often():
    generator = torch.Generator().manual_seed(0)
    counts = Counter(choose_caption(("a", "b", "c"), generator) for _ in range(3000))
    assert counts.keys() == {"a", "b", "c"}
    assert all(900 < count < 1100 for count in counts.values())


def test_the_generator_alone_decides():
    captions = tuple("abcdefgh")
    chosen = [choose_caption(captions, torch.Generator().manual_seed(seed)) for seed in range(40)]
    assert chosen == [choose_caption(captions, torch.Generator().manual_seed(seed)) for seed in range(40)]
    assert len(set(chosen)) > 4


def test_a_single_caption_takes_no_draw():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert choose_caption(("a",), generator) == "a"
    assert torch.equal(generator.get_state(), before)
    choose_caption(("a", "b"), generator)
    assert not torch.equal(generator.get_state(), before)
