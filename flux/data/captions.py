"""Caption files of strangers -> captions, or the reason why not; and which caption of a picture is shown."""

import json
import re
from collections.abc import Sequence
from typing import Any, Literal

import torch

from flux.data.errors import BadSample

MAX_CAPTION_BYTES = 8_000  # of UTF-8; text encoders read 512 tokens at most
MAX_JSON_BYTES = 1_000_000
USUAL_FIELDS = ("text", "caption")  # of JSON, where none is configured

CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")  # all of Unicode's but those that count as whitespace


def parse_text(data: bytes) -> tuple[str, ...]:
    """The caption of a text file, runs of whitespace made one space; an empty file has the caption "".

    Raises:
        BadSample: bad_caption.
    """
    _check_bytes(data, MAX_CAPTION_BYTES, "caption")
    return (_clean(_decode(data)),)


def parse_json(data: bytes, field: str | None) -> tuple[str, ...]:
    """The captions of a JSON object, as `parse_text` makes them.

    Args:
        data: the file.
        field: name of the field that holds the caption or a list of them; None: "text", else "caption".

    Raises:
        BadSample: no_caption where the field is missing, null or an empty list; bad_caption.
    """
    _check_bytes(data, MAX_JSON_BYTES, "JSON")
    text = _decode(data)
    try:
        entry = json.loads(text)  # NaN too, which many writers put into other fields
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_caption", f"not JSON: {error}") from error
    if not isinstance(entry, dict):
        raise BadSample("bad_caption", f"the JSON is a {type(entry).__name__}, and an object is needed")
    names = USUAL_FIELDS if field is None else (field,)
    name = next((name for name in names if entry.get(name) is not None), None)
    if name is None:
        raise BadSample("no_caption", f"the JSON has no {' or '.join(names)}")
    captions = entry[name] if isinstance(entry[name], list) else [entry[name]]
    if not captions:
        raise BadSample("no_caption", f"{name} is an empty list")
    return tuple(_clean(_check_string(caption, name)) for caption in captions)


def clean_captions(captions: Sequence[str], empty: Literal["bad", "unconditional"]) -> tuple[str, ...]:
    """The captions that say something.

    Args:
        captions: of one picture, of `parse_text` or `parse_json`.
        empty: what it means that there are none: data.empty_caption.

    Raises:
        BadSample: no_caption.
    """
    written = tuple(caption for caption in captions if caption)
    if not written and empty == "bad":
        raise BadSample("no_caption", "the caption is empty")
    return written or ("",)


def choose_caption(captions: Sequence[str], generator: torch.Generator) -> str:
    """One of the captions, all equally likely; a single one takes no draw from the generator."""
    if len(captions) == 1:
        return captions[0]
    return captions[int(torch.randint(len(captions), (), generator=generator))]


def _check_bytes(data: bytes, most: int, what: str) -> None:
    if len(data) > most:
        raise BadSample("bad_caption", f"a {what} of {len(data):,} bytes, and {most:,} are allowed")


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("bad_caption", f"not UTF-8: {error.reason} at byte {error.start}") from error


def _check_string(caption: Any, name: str) -> str:
    """A string that UTF-8 can write and that is not too long."""
    if not isinstance(caption, str):
        raise BadSample("bad_caption", f"{name} holds a {type(caption).__name__}, and strings are needed")
    try:
        _check_bytes(caption.encode(), MAX_CAPTION_BYTES, "caption")
    except UnicodeEncodeError as error:  # JSON's escapes can spell halves of characters
        raise BadSample("bad_caption", f"{name} has half a character at place {error.start}") from error
    return caption


def _clean(text: str) -> str:
    control = CONTROL.search(text)
    if control:
        raise BadSample("bad_caption", f"has the control character U+{ord(control[0]):04X} at place {control.start()}")
    return " ".join(text.split())
