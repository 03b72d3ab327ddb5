"""The checkpoints of a run as folders: `step-N` is whole from the moment it is seen; what is hidden is not finished."""

import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

_STEP = re.compile(r"step-(0|[1-9][0-9]*)")
_UNFINISHED, _EXPIRED = ".unfinished-", ".expired-"


def find_steps(folder: Path) -> dict[int, Path]:
    """Step -> its checkpoint, in ascending order."""
    if not folder.is_dir():
        return {}
    found = {int(match[1]): path for path in folder.iterdir() if (match := _STEP.fullmatch(path.name))}
    return dict(sorted(found.items()))


def step_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step}"


def unfinished_path(final: Path) -> Path:
    """Where a checkpoint is written until it is whole."""
    return final.with_name(_UNFINISHED + final.name)


def publish(final: Path) -> None:
    """Makes a written checkpoint visible, for good: it survives a loss of power from here on.

    Raises:
        FileExistsError: there is a checkpoint of that name already.
    """
    unfinished = unfinished_path(final)
    sync_folder(unfinished)
    if final.exists():  # an empty folder would be replaced in silence
        raise FileExistsError(f"{final} exists already")
    unfinished.rename(final)
    sync_folder(final.parent)


def discard(final: Path) -> None:
    """Deletes what was written of a checkpoint that has failed."""
    shutil.rmtree(unfinished_path(final), ignore_errors=True)


def write_folder(final: Path, fill: Callable[[Path], None]) -> None:
    """Fills a hidden folder, which becomes `final` at the end; nothing is left of one that fails.

    Raises:
        FileExistsError: something is there already that is no empty folder.
    """
    discard(final)
    try:
        unfinished_path(final).mkdir(parents=True)
        fill(unfinished_path(final))
        if final.is_dir() and not any(final.iterdir()):
            final.rmdir()
        publish(final)
    except BaseException:
        discard(final)
        raise


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(folder: Path) -> None:
    """Clears what a stopped run has left half written or half deleted."""
    for path in folder.iterdir():
        if path.name.startswith((_UNFINISHED, _EXPIRED)):
            shutil.rmtree(path, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint, so that its step can be saved again. Nothing is deleted."""
    number = 1
    while (target := path.with_name(f"damaged-{path.name}" + (f"-{number}" if number > 1 else ""))).exists():
        number += 1
    return path.rename(target)


def find_expired(steps: Collection[int], keep_latest_k: int, keep_every: int) -> list[int]:
    """The steps whose checkpoints may go: neither among the latest k (0: all stay) nor permanent."""
    old = sorted(steps)[:-keep_latest_k] if keep_latest_k else []
    return [step for step in old if not (keep_every and step % keep_every == 0)]


def most_at_once(steps: Collection[int], keep_latest_k: int, keep_every: int) -> int:
    """How many checkpoints of these steps lie in a folder at most: a new one is complete before an old one goes."""
    before = find_expired(steps, keep_latest_k + 1 if keep_latest_k else 0, keep_every)
    return len(steps) - len(before)


def remove_expired(folder: Path, keep_latest_k: int, keep_every: int) -> None:
    """Deletes checkpoints that are no longer wanted; each vanishes at once, never file by file."""
    steps = find_steps(folder)
    for step in find_expired(steps, keep_latest_k, keep_every):
        hidden = steps[step].rename(folder / f"{_EXPIRED}{steps[step].name}")
        shutil.rmtree(hidden, ignore_errors=True)
