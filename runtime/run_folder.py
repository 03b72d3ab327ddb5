"""The folder a run writes into. Two runs never share one; a run that saves checkpoints goes on in its own."""

import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.exit_record import RECORD_NAME
from runtime.run_lock import LOCK_NAME, FolderInUse, RunLock
from runtime.watchdog import STACKS_FOLDER


@contextmanager
def closed_to_others() -> Iterator[None]:
    """Files that are made inside are not for everybody on the machine. What the group may do, the user's umask says."""
    before = os.umask(0)
    os.umask(before | 0o007)
    try:
        yield
    finally:
        os.umask(before)


def claim_run_folder(dump_folder: str | Path, resumable: str | None = None) -> Path:
    """Makes the folder and returns it, or the next name when it is in use: `outputs/tiny`, `outputs/tiny-2`, ...

    An empty folder is free (a mounted volume, say), and so is that of a run that ended before its first logged step. Of
    two processes that claim one name at the same moment, one gets the next. Only one process of a run may call it.

    Args:
        resumable: name of the folder of checkpoints, for a run that goes on where it stopped: the first folder that is
            free or holds one by this name. It is made at once, so that a run that was stopped before its first
            checkpoint is found again too, and the run folder is locked until this process ends.

    Raises:
        ValueError: no folder can be made there, or it cannot be written to.
        FolderInUse: a resumable run is still running there.
    """
    wanted = Path(dump_folder)
    if wanted.name in ("", ".."):
        wanted = wanted.resolve()
    try:
        return next(
            folder
            for folder in _candidates(wanted)
            if (_claim(folder) if resumable is None else _claim_resumable(folder, resumable))
        )
    except FolderInUse:
        raise
    except (OSError, ValueError) as error:
        raise unusable(dump_folder, error) from None


def unusable(dump_folder: str | Path, error: Exception) -> ValueError:
    """What is raised for a folder that no run can write into."""
    return ValueError(
        f"job.dump_folder={str(dump_folder)!r} must be a folder that can be made and written to, but: {error}; "
        "choose another with --job.dump_folder"
    )


def _candidates(wanted: Path) -> Iterator[Path]:
    yield wanted
    for number in itertools.count(2):
        yield wanted.with_name(f"{wanted.name}-{number}")


def _claim_resumable(folder: Path, checkpoints: str) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / checkpoints).is_symlink() and not (folder / checkpoints).exists():
        raise ValueError(f"{folder / checkpoints} leads to {(folder / checkpoints).readlink()}, which is not there")
    if not (folder / checkpoints).is_dir() and not _is_free(folder, besides=LOCK_NAME):
        return False  # and nothing was left in it
    lock = RunLock(folder)
    # Looked at again, now that no other run of this kind can change it.
    if (folder / checkpoints).is_dir():
        (folder / RECORD_NAME).unlink(missing_ok=True)  # how the run ended the last time
        shutil.rmtree(folder / STACKS_FOLDER, ignore_errors=True)  # of as many ranks as it had then
        return True
    if _claim(folder, besides=LOCK_NAME):
        (folder / checkpoints).mkdir(parents=True)
        return True
    lock.release()
    return False


def _claim(folder: Path, besides: str | None = None) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    metrics, record = folder / "metrics.jsonl", folder / RECORD_NAME
    # Creating the run's first file, or removing the record of a run that ended before its first step, is the claim:
    # it happens once, whoever else looks at the same folder.
    try:
        if not _is_free(folder, besides):
            return False
        if record.exists():
            record.unlink()
        else:
            metrics.touch(exist_ok=False)
    except (FileExistsError, FileNotFoundError):
        return False
    return True


def _is_free(folder: Path, besides: str | None) -> bool:
    """Empty, or of a run that ended before its first step and is not to go on.

    Args:
        besides: a file that does not count.
    """
    names = {path.name for path in folder.iterdir()} - {besides}
    ended = {RECORD_NAME, "metrics.jsonl"} <= names and LOCK_NAME not in names
    return not names or (ended and not (folder / "metrics.jsonl").stat().st_size)
