"""Kinds of arguments that several benchmarks take: what is wrong with one is said before hours of measuring."""

import argparse
import shlex
from pathlib import Path


def variant(text: str) -> str:
    """Options of a configuration, such as `compile.enable=true training.dtype=bfloat16`."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error
    if not words:
        raise argparse.ArgumentTypeError("no options: the run without a variant is there anyway")
    return text


def split_variant(text: str) -> list[str]:
    """The same as words of a command line."""
    return [f"--{word}" for word in shlex.split(text)]


def new_file(text: str) -> Path:
    """A place to write to."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: name a file in it")
    return path
