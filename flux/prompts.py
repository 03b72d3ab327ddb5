"""Prompt files."""

from pathlib import Path


def load_prompts(path: str | Path, key: str) -> list[str]:
    """The non-empty lines of a UTF-8 text file, one prompt each.

    Raises:
        ValueError: no such file, not UTF-8, no prompt in it; `key` is named in the message.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"{key}={str(path)!r} cannot be read as UTF-8 text ({why}): give a file with one prompt per line"
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{key}={str(path)!r} has no prompts: write one per line")
    return prompts
