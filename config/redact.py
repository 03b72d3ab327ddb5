"""Keeps access tokens out of messages, logs and files."""

import re

# Hugging Face tokens, and 40 hexadecimal digits as Weights & Biases issues
# them; behind a slash they are the folder of a commit.
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{30,}|(?<![0-9A-Za-z/])[0-9a-fA-F]{40}(?![0-9A-Za-z])")


def has_token(value: object) -> bool:
    """Whether something that looks like an access token is anywhere in a value read from TOML or the command line."""
    return _TOKEN.search(str(value)) is not None


def redact(text: str) -> str:
    """The text with everything that looks like an access token blacked out."""
    return _TOKEN.sub("********", text)
