"""What is blacked out of messages and files, and what is not."""

import pytest

from redact import BLACKED, redact, redact_values


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:secret@host/a.tar", "https://********@host/a.tar"),
        ("https://token@host/a.tar is lost", "https://********@host/a.tar is lost"),
        ("http://u:p@ss@host:80/x@y", "http://********@host:80/x@y"),
        ("s3://key:secret@bucket/x", "s3://********@bucket/x"),
        ("'https://u:p@h/a', 'https://v:q@h/b'", "'https://********@h/a', 'https://********@h/b'"),
        ("https://h/a?X-Amz-Signature=5f/+=&n=1", "https://h/a?X-Amz-Signature=********&n=1"),
        ("https://h/a?n=1&sig=a%2Bb): try again", "https://h/a?n=1&sig=********): try again"),
        ("https://h/a?x-goog-credential=me&X-Goog-Date=1", "https://h/a?x-goog-credential=********&X-Goog-Date=1"),
        ("{https://h/a?token=1,https://h/b?token=2}", "{https://h/a?token=********,https://h/b?token=********}"),
        ("https://h/a?AWSAccessKeyId=A&api_key=B", "https://h/a?AWSAccessKeyId=********&api_key=********"),
        (f"login hf_{'aB3' * 12}!", "login ********!"),
        (f"key {'0f' * 20}", "key ********"),
    ],
)
def test_secrets_are_blacked_out(text, shown):
    assert redact(text) == shown == redact(shown)


@pytest.mark.parametrize(
    "text",
    [
        "https://host/a.tar?file=1&design=2",
        "https://h/get?key=a/0001.tar",
        "hf://datasets/owner/name@main/a.parquet",
        "write to me@host about https://h/x",
        f"/cache/snapshots/{'0a' * 20}/text_encoder",
        f"sha256 {'0123456789abcdef' * 4}",
        "token 12 of 77, signature=none",
    ],
)
def test_what_is_no_secret_stays(text):
    assert redact(text) == text


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "my_password"]
)
def test_secrets_of_the_environment(monkeypatch, name):
    monkeypatch.setenv(name, "planted value")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "a plain value")
    assert redact("a planted value and a plain value") == f"a {BLACKED} and a plain value"
    monkeypatch.setenv(name, "yes")
    assert redact("yes") == "yes", "too short to be one"


def test_trees_of_values():
    values = {"a": ["https://u:p@h/x", 1, None], "b": {"c": "https://u:p@h/x", "d": True}}
    shown = {"a": ["https://********@h/x", 1, None], "b": {"c": "https://********@h/x", "d": True}}
    assert redact_values(values) == shown != values
