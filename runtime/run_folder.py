"""The folder a run writes into. Two runs never share one, so no file in it mixes two runs."""

import itertools
from pathlib import Path

from runtime.exit_record import RECORD_NAME


def claim_run_folder(dump_folder: str | Path) -> Path:
    """Makes the folder and returns it, or the next free name when it is in use: `outputs/tiny`, `outputs/tiny-2`, ...

    An empty folder is free (a mounted volume, say), and so is that of a run that ended before its first logged step. Of
    two processes that claim one name at the same moment, one gets the next. Only one process of a run may call it.

    Raises:
        ValueError: no folder can be made there, or it cannot be written to.
    """
    wanted = Path(dump_folder)
    if wanted.name in ("", ".."):
        wanted = wanted.resolve()
    try:
        return next(folder for folder in _candidates(wanted) if _claim(folder))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"job.dump_folder={str(dump_folder)!r} must be a folder that can be made and written to, but: {error}; "
            "choose another with --job.dump_folder"
        ) from None


def _candidates(wanted: Path):
    yield wanted
    for number in itertools.count(2):
        yield wanted.with_name(f"{wanted.name}-{number}")


def _claim(folder: Path) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    metrics, record = folder / "metrics.jsonl", folder / RECORD_NAME
    # Creating the run's first file, or removing the record of a run that ended before its first step, is the claim:
    # it happens once, whoever else looks at the same folder.
    try:
        if record.exists() and metrics.exists() and not metrics.stat().st_size:
            record.unlink()
            return True
        if any(folder.iterdir()):
            return False
        metrics.touch(exist_ok=False)
    except (FileExistsError, FileNotFoundError):
        return False
    return True
