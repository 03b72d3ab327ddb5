"""Keeps what opens a door out of messages, logs and files: access tokens, and the secret parts of URLs.

Every room may import this module, and it imports none.
"""

import os
import re
from typing import Any

BLACKED = "********"  # stands where a secret was

# Hugging Face tokens, and 40 hexadecimal digits as Weights & Biases issues
# them; behind a slash they are the folder of a commit.
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{30,}|(?<![0-9A-Za-z/])[0-9a-fA-F]{40}(?![0-9A-Za-z])")
# The `user:password@` of a URL, and what signs it in its query, as S3, Google Cloud and Azure do.
_LOGIN = re.compile(r"(?<=://)[^/\s]+(?=@)")
_SIGNATURE = re.compile(
    r"([?&][\w.-]*(?:signature|token|secret|passw(?:or)?d|credential|api_?key|access_?key)[\w.-]*=|[?&]sig=)"
    r"[^&\s'\"()\[\]{}<>,;]+",
    re.IGNORECASE,
)
# Environment variables that hold a secret, by their names.
_SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|_KEY|CONNECTION_STRING)$", re.IGNORECASE)
_SHORTEST = 8  # characters of a variable that is taken for a secret


def has_token(value: object) -> bool:
    """Whether something that looks like an access token is anywhere in a value read from TOML or the command line."""
    return _TOKEN.search(str(value)) is not None


def redact(text: str) -> str:
    """The text with everything blacked out that looks like a secret, or is one of this process's environment."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and value in text and _SECRET_NAME.search(name):
            text = text.replace(value, BLACKED)
    text = _LOGIN.sub(BLACKED, _TOKEN.sub(BLACKED, text))
    return _SIGNATURE.sub(rf"\g<1>{BLACKED}", text)


def redact_values(values: Any) -> Any:
    """A tree of dicts and lists, such as a configuration, with its texts redacted."""
    if isinstance(values, dict):
        return {name: redact_values(value) for name, value in values.items()}
    if isinstance(values, list):
        return [redact_values(value) for value in values]
    return redact(values) if isinstance(values, str) else values
