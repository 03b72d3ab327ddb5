"""One run, one folder: a lock for the life of the process that writes into it.

`flock` decides where it can: on one machine always, between machines where the file system carries it over. Because
some file systems do not (and do not say so), the holder also writes a heartbeat into the file. What another machine
left there is watched for a while: if it moves, its run is alive.
"""

import atexit
import contextlib
import errno
import fcntl
import json
import logging
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

LOCK_NAME = "run.lock"  # in the run folder; empty when its run ended in order
HEARTBEAT_SECONDS = 5.0
WATCHED_BEATS = 2.5
_LENGTH = 512  # of the record, padded: one write in place, never a moment without content
_NO_FLOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}

log = logging.getLogger(__name__)


class FolderInUse(ValueError):
    """Another run writes into the folder."""


class RunLock:
    """Holds a folder from the moment it is made until `release` or the end of the process, however that comes.

    Raises:
        FolderInUse: another process holds it.
        OSError: the lock file cannot be written.
    """

    def __init__(self, folder: Path):
        self._path = folder / LOCK_NAME
        self._path.touch()
        self._file = self._path.open("r+b", buffering=0)  # unbuffered: a fork inherits nothing that it could write
        try:
            self._take()
        except BaseException:
            self._file.close()
            raise
        self._owner = _describe_this_process()
        self._beats = 0
        self._released = threading.Event()
        self._beat()
        # A worker that outlives its killed run must not keep the lock that it inherited.
        os.register_at_fork(after_in_child=self._file.close)
        atexit.register(self.release)
        self._heart = threading.Thread(target=self._keep_beating, name="run lock", daemon=True)
        self._heart.start()

    def release(self) -> None:
        """Leaves the folder to others. The file stays: removing it could take away one that a new holder has opened."""
        self._released.set()
        self._heart.join(timeout=HEARTBEAT_SECONDS)
        if self._file.closed or self._heart.is_alive():  # a child of fork; a server that does not answer
            return
        if _read(self._path).get("owner") == self._owner:
            self._file.truncate(0)
        self._file.close()

    def _take(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(self._path) from None
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
        else:
            if _is_ofthis_machine(_read(self._path)):
                return  # of a run that is dead, or flock would have refused
        if _moves(self._path):
            raise _in_use(self._path)

    def _keep_beating(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            found = _read(self._path).get("owner", self._owner)
            if found != self._owner:
                self._give_way(found)
                return
            with contextlib.suppress(OSError):  # a server that does not answer: the next beat may get through
                self._beat()

    def _beat(self) -> None:
        self._beats += 1
        record = json.dumps({"owner": self._owner, "beat": self._beats}).encode()
        os.pwrite(self._file.fileno(), record.ljust(_LENGTH - 1) + b"\n", 0)
        os.fsync(self._file.fileno())

    def _give_way(self, owner: dict[str, Any]) -> None:
        """This process was suspended for so long that another took it for dead."""
        log.error("%s was taken over by %s while this run stood still: it stops", self._path.parent, _name(owner))
        os.kill(os.getpid(), signal.SIGTERM)


def _describe_this_process() -> dict[str, Any]:
    return {
        **this_machine(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def this_machine() -> dict[str, str]:
    """Name and boot: containers on several machines may share a name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {"host": socket.gethostname(), "boot": boot.read_text().strip() if boot.exists() else ""}


def _is_ofthis_machine(record: dict[str, Any]) -> bool:
    return this_machine().items() <= record.get("owner", {}).items()


def _read(path: Path) -> dict[str, Any]:
    """What is in the lock file: owner and beat, or nothing where there is no whole record."""
    # Opened anew each time: that is when a network file system asks its server.
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("owner"), dict) else {}


def _moves(path: Path) -> bool:
    """Whether the heartbeat of the record's owner goes on, as far as a few beats show."""
    first = path.read_bytes()
    if not first:
        return False
    seconds = WATCHED_BEATS * HEARTBEAT_SECONDS
    owner = _name(_read(path).get("owner", {}))
    log.info("%s was held by %s: watching %g s for its heartbeat", path.parent, owner, seconds)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(HEARTBEAT_SECONDS / 5)
        if (now := path.read_bytes()) and now != first:
            return True
    return False


def _in_use(path: Path) -> FolderInUse:
    return FolderInUse(
        f"{path.parent} is in use by {_name(_read(path).get('owner', {}))}: "
        "wait for it, stop it, or choose another --job.dump_folder"
    )


def _name(owner: dict[str, Any]) -> str:
    job = f"job {owner['job']}" if owner.get("job") else "a run"
    return f"{job} on {owner['host']}, process {owner['pid']}" if {"host", "pid"} <= owner.keys() else "another run"
