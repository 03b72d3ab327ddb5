"""Ranks that save checkpoints until they are killed."""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.distributed.ranks import CONTEXT

WORLD = 2
PATIENCE = 300  # seconds; for what takes a fraction of one, unless a busy disk holds up an fsync


class MortalRanks:
    """WORLD processes that run `keep_saving`.

    Args:
        home: an empty folder for what they tell and how they meet.
        options: keys of [checkpoint].
        dies_at: rank -> number of the point in its first save (see `watch_points`) at which it kills itself.
        in_place: as a faulty recipe would, they write into the visible folder.
    """

    def __init__(
        self,
        home: Path,
        folder: Path,
        options: Mapping[str, Any],
        saves: int,
        dies_at: Mapping[int, int] | None = None,
        in_place: bool = False,
    ):
        home.mkdir(parents=True)
        self._home = home
        self._ranks = [
            CONTEXT.Process(
                target=keep_saving,
                args=(rank, str(home), str(folder), dict(options), saves, (dies_at or {}).get(rank), in_place),
                daemon=True,
            )
            for rank in range(WORLD)
        ]
        for rank in self._ranks:
            rank.start()

    def told(self, word: str, rank: int = 0) -> list[str]:
        """What a rank has told under a word, in order."""
        path = self._home / f"rank-{rank}"
        lines = [line.split(maxsplit=1) for line in path.read_text().splitlines()] if path.exists() else []
        return [line[-1] for line in lines if line[0] == word]

    def await_word(self, word: str, times: int = 1) -> None:
        """Until the first rank has told something under a word so many times, or is dead."""
        self._await(lambda: len(self.told(word)) >= times or not self._ranks[0].is_alive())

    def kill(self, ranks: list[int]) -> None:
        for rank in ranks:
            self._ranks[rank].kill()

    def await_end(self) -> list[int]:
        """Exit codes, once all have ended by themselves."""
        self._await(lambda: not any(rank.is_alive() for rank in self._ranks))
        return [rank.exitcode for rank in self._ranks]

    def await_any_end(self) -> None:
        self._await(lambda: not all(rank.is_alive() for rank in self._ranks))

    def end(self) -> None:
        """As a launcher does once a rank is dead."""
        for rank in self._ranks:
            rank.kill()
            rank.join(PATIENCE)

    def _await(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"ranks hang; the first told {self.told('error')}"
            time.sleep(0.002)


def keep_saving(
    rank: int, home: str, folder: str, options: dict[str, Any], saves: int, dies_at: int | None, in_place: bool
) -> None:
    """Goes on from the newest checkpoint and saves every step, as a run does. Tells what it does in a file."""
    import torch
    import torch.distributed as dist

    import checkpoint.dcp
    from checkpoint.checkpointer import Checkpointer
    from checkpoint.config import Checkpoint
    from checkpoint.errors import CheckpointError
    from tests.unit.checkpoint.saves import make_values, make_zeros, save, share

    torch.set_num_threads(1)
    descriptor = os.open(f"{home}/rank-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def tell(word: str, value: object) -> None:
        os.write(descriptor, f"{word} {value}\n".encode())

    class Teller(logging.Handler):
        """What a user reads on the log is what a run has promised him."""

        def emit(self, record: logging.LogRecord) -> None:
            tell("committed" if record.levelno == logging.INFO else "error", record.getMessage())

    log = logging.getLogger("checkpoint.checkpointer")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(Teller())
    if in_place:
        checkpoint.dcp.unfinished_path = lambda final: final
    if dies_at is not None:
        watch_points(folder, dies_at, tell)

    dist.init_process_group("gloo", store=dist.FileStore(f"{home}/store", WORLD), rank=rank, world_size=WORLD)
    checkpointer = Checkpointer(Path(folder), Checkpoint(enable=True, **options), dist.new_group())
    found = checkpointer.find()
    if found:
        loaded = make_zeros()
        checkpointer.load(found, share(loaded))
        assert all(torch.equal(loaded[name], values) for name, values in make_values(found.step).items()), found.path
    first = found.step if found else 0
    tell("found", first)
    try:
        for step in range(first + 1, first + saves + 1):
            tell("started", step)
            save(checkpointer, step, rank, WORLD)
            checkpointer.poll()
        checkpointer.finish()
    except CheckpointError as error:  # the other rank is dead
        tell("error", error)
        sys.exit(1)
    dist.barrier()


def watch_points(folder: str, dies_at: int, tell: Callable[[str, object], None]) -> None:
    """Kills this process at a point of its save: before anything is done to a file or folder of the checkpoints.

    That is also after everything but the last; the last of all is the end of the save.

    Args:
        dies_at: number of the point; higher than there are points: it lives, and tells them all.
    """
    import shutil

    import torch

    import checkpoint.checkpointer

    seen = 0

    def point(name: str) -> None:
        nonlocal seen
        if threading.current_thread().name != "checkpoint":
            return
        tell("point", name)
        if seen == dies_at:
            os.kill(os.getpid(), 9)
        seen += 1

    def before(module: Any, name: str, says: Callable[..., str]) -> None:
        original = getattr(module, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            point(says(*args))
            return original(*args, **kwargs)

        setattr(module, name, watched)

    def audit(event: str, args: tuple) -> None:
        kinds = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}
        if event not in kinds or not isinstance(args[0], str):
            return
        if args[0].startswith(folder):
            point(f"{event} {args[0].removeprefix(folder)}")
        elif "/" not in args[0]:  # what a folder is emptied of has only a name, and any order
            point(event)

    before(torch, "save", lambda tensor, file: f"write {file.name.removeprefix(folder)}")
    before(os, "fsync", lambda descriptor: f"fsync {os.readlink(f'/proc/self/fd/{descriptor}').removeprefix(folder)}")
    save_checkpoint = checkpoint.checkpointer.save_checkpoint

    def and_after(*args: Any, **kwargs: Any) -> None:
        save_checkpoint(*args, **kwargs)
        point("end")

    checkpoint.checkpointer.save_checkpoint = and_after
    assert shutil.rmtree.avoids_symlink_attacks  # it works with names relative to the folder
    sys.addaudithook(audit)
