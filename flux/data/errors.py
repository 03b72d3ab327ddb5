"""The errors for faulty data; the program ends with exit code 3 on them."""

from typing import Literal, get_args

from redact import redact

# Why a sample cannot be used; metrics count by these words.
Reason = Literal[
    "unreadable",  # its bytes are not there: a shard that is cut short, lost or not readable
    "damaged",  # its bytes are no picture that decodes
    "animated",
    "too_small",  # a side under data.min_side
    "too_long",  # an aspect ratio over data.max_aspect
    "too_large",  # more than data.max_megapixels
    "no_caption",  # missing or empty
    "bad_caption",  # not UTF-8, not the JSON that it should be, or far too long
]
REASONS: tuple[Reason, ...] = get_args(Reason)


class DataError(ValueError):
    """A data set cannot be used. The message names the file, the rule and the remedy."""


class BadSample(DataError):
    """One sample cannot be used; another one takes its place.

    Args:
        reason: one of REASONS.
        detail: what is wrong with it, for people.
        key: the sample's name in its shard.
        shard: the file that holds it.
    """

    def __init__(self, reason: Reason, detail: str, key: str = "", shard: str = ""):
        detail = redact(detail)  # which is written down, and may quote a URL
        super().__init__(f"{shard}: {key}: {detail}" if shard else f"{key}: {detail}")
        self.reason = reason
        self.detail = detail
        self.key = key
        self.shard = shard
