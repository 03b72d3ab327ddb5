"""Saves the checkpoints of a run, finds the one to go on from, and loads it.

Saves take place in a thread of their own. Without async_mode training waits for it at once; with it, the thread writes
a copy in the CPU's memory while training goes on, and the next save waits for the one before.
"""

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from checkpoint.background import BackgroundSave, Staging
from checkpoint.compare import check_tensors, part_of
from checkpoint.config import PARTS, Checkpoint
from checkpoint.dcp import (
    TRAIN_STATE,
    explain,
    is_weight,
    load_checkpoint,
    read_train_state,
    save_checkpoint,
    tensor_entries,
)
from checkpoint.errors import CheckpointError
from checkpoint.manifest import MANIFEST, find_problems, read_manifest
from checkpoint.safe_metadata import METADATA, read_metadata
from checkpoint.slices import Slices
from checkpoint.steps import find_steps, remove_expired, remove_unfinished, set_aside, step_path, sync_folder

CLOSE_SECONDS = 20.0  # torchrun kills 30 s after SIGTERM, however long a job system would wait
MAX_FAILED_SAVES = 3  # in a row; after that a run would go on for long without anything to come back to

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A whole checkpoint to start from.

    Args:
        train_state: of the run that goes on; empty: only the weights are taken.
        excluded: parts that start anew (checkpoint.exclude_from_loading).
        is_own: of the run itself; else it is from elsewhere.
    """

    path: Path
    train_state: Mapping[str, Any]
    excluded: frozenset[str]
    is_own: bool = False

    @property
    def step(self) -> int:
        return self._number("train_state", "step")

    @property
    def samples_seen(self) -> int:
        return self._number("dataloader", "samples_seen")

    @property
    def schedule_step(self) -> int:
        return self._number("lr_scheduler", "schedule_step")

    def _number(self, part: str, key: str) -> int:
        return 0 if part in self.excluded else int(self.train_state.get(key, 0))

    def describe(self) -> str:
        """What a run that starts from it does."""
        doing = f"goes on after step {self.step}" if self.train_state else "new, with the weights"
        return f"{doing} from {self.path}"

    def holds(self, part: str) -> bool:
        """Whether a part is to be loaded."""
        return bool(self.train_state) and part not in self.excluded

    def weights(self) -> dict[str, Tensor]:
        """The model's tensors by name, on the meta device: their shapes."""
        entries = tensor_entries(read_metadata(self.path))
        return {name: torch.empty(entry.size, device="meta") for name, entry in entries.items() if is_weight(name)}


class Checkpointer:
    """The checkpoints of one run; all its processes make one and call the same methods.

    Args:
        folder: of the checkpoints; made when missing.
        section: [checkpoint].
        group: a group of all processes that is used for nothing else, on the CPU; None: there is one process.
    """

    def __init__(self, folder: Path, section: Checkpoint, group: ProcessGroup | None):
        self._folder, self._section, self._group = folder, section, group
        self._rank = dist.get_rank(group) if group else 0
        self._save: BackgroundSave | None = None  # the latest
        self._failed = 0  # saves in a row
        self._started_anew: frozenset[str] = frozenset()  # parts that the run has not taken over from a checkpoint
        self.longest_save = 0.0  # seconds
        self._last_save = time.monotonic()
        self._stage = Staging(pinned=section.async_mode == "async_with_pinned_mem")
        self.saves = section.saves
        if self.saves and self._rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            sync_folder(folder.parent)
            remove_unfinished(folder)

    def find(self) -> Found | None:
        """What the run starts from; None: from fresh weights, or those of `initial_load_in_hf`.

        That is its own checkpoint of load_step, or its newest whole one, else initial_load_path. Every file is checked,
        each process taking its share. A damaged checkpoint is named and set aside, and the next older one is taken.

        Raises:
            ValueError: load_step or initial_load_path cannot be used, or newer steps are in the way of load_step.
            CheckpointError: the run has checkpoints, and none is whole.
        """
        if self._section.enable and (own := self._find_own()):
            self._started_anew |= own.excluded
            return own
        self._started_anew = frozenset(self._section.exclude_from_loading)
        return self._find_initial()

    def _find_own(self) -> Found | None:
        steps = self._agree(list(find_steps(self._folder)))
        if (wanted := self._section.load_step) >= 0 and (steps or not self._section.initial_load_path):
            return self._find_step(wanted, steps)
        damaged: dict[Path, list[str]] = {}
        for path in (step_path(self._folder, step) for step in reversed(steps)):
            if problems := self._check(path):
                damaged[path] = problems
                continue
            for newer, problems in damaged.items() if self._rank == 0 else ():
                self._tell_damage(newer, problems)
            return self._own(path)
        if damaged:
            first = next(iter(damaged.values()))[0]
            raise CheckpointError(
                f"{self._folder} has {len(steps)} checkpoints and none is whole, {first}: put one back, or start anew "
                "in another job.dump_folder"
            )
        return None

    def _find_initial(self) -> Found | None:
        section = self._section
        if section.initial_load_path is None or section.initial_load_in_hf:
            return None
        path = Path(section.initial_load_path)
        if not (path / METADATA).is_file():
            hint = ": with a diffusers folder or a safetensors file, set checkpoint.initial_load_in_hf=true"
            raise ValueError(
                f"checkpoint.initial_load_path={str(path)!r} must be a checkpoint such as .../step-1000{hint}"
            )
        # Only this recipe's checkpoints know what they must be.
        if (path / MANIFEST).exists() and (problems := self._check(path)):
            raise ValueError(f"checkpoint.initial_load_path: {problems[0]}: take another checkpoint")
        names = list(Found(path, {}, frozenset()).weights())
        if names and all(name.startswith("model.") for name in names):
            raise ValueError(
                f"checkpoint.initial_load_path={str(path)!r} has names that begin with 'model.', as MLPerf's reference "
                "writes them: take what `python -m scripts.convert_checkpoint --to dcp` makes of it"
            )
        state = {} if section.initial_load_model_only else read_train_state(path)
        if not state and not section.initial_load_model_only:
            raise ValueError(
                f"checkpoint.initial_load_path={str(path)!r} has no {TRAIN_STATE}, so a run cannot go on from it: take "
                "its weights with checkpoint.initial_load_model_only=true"
            )
        return Found(path, state, frozenset(section.exclude_from_loading))

    def _own(self, path: Path) -> Found:
        """The run itself goes on; what it has left out once, it has of its own since."""
        state = read_train_state(path)
        self._started_anew = frozenset(state.get("started_anew", ()))
        excluded = frozenset(self._section.exclude_from_loading) - self._started_anew
        if again := self._started_anew & frozenset(self._section.exclude_from_loading):
            names = ", ".join(sorted(again))
            log.info("checkpoint.exclude_from_loading: %s started anew before, and is gone on with now", names)
        if "train_state" in excluded and state.get("step"):
            raise ValueError(
                f"checkpoint.exclude_from_loading=train_state would start at step 0 again, before {path}: do it in "
                f"another job.dump_folder with checkpoint.initial_load_path={path}"
            )
        return Found(path, state, excluded, is_own=True)

    def _find_step(self, wanted: int, steps: list[int]) -> Found:
        path = step_path(self._folder, wanted)
        if wanted not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise ValueError(f"checkpoint.load_step={wanted} is not in {self._folder}: it has the steps {there}")
        if wanted != steps[-1]:
            raise ValueError(
                f"checkpoint.load_step={wanted}: {step_path(self._folder, steps[-1])} is newer and would be in the way:"
                " move the newer ones elsewhere, or start in another job.dump_folder from "
                f"checkpoint.initial_load_path={path} with checkpoint.initial_load_model_only=false"
            )
        if problems := self._check(path):
            raise ValueError(f"checkpoint.load_step={wanted}: {problems[0]}: take another step")
        return self._own(path)

    def _check(self, path: Path) -> list[str]:
        """What is wrong with a checkpoint; the same on all processes.

        Raises:
            CheckpointError: it could not be looked at, which is another thing.
        """
        world = dist.get_world_size(self._group) if self._group else 1
        problems, unread = self._look(path, (self._rank, world))
        answers = self._gather((problems, unread))
        found = list(dict.fromkeys(problem for part, _ in answers for problem in part))
        unread = next((text for _, text in answers if text), "")
        if found and not unread:
            # A file that a process does not see, or sees otherwise, may be whole all the same: the first one looks.
            again, unread = self._agree(self._look(path, named_in=found) if self._rank == 0 else None)
            if not (again or unread):
                unread = f"{found[0]}, but not to another process: is the folder shared by all?"
        if unread:
            raise CheckpointError(f"{path} cannot be read: {unread}: nothing was changed, try again")
        return found

    def _look(
        self, path: Path, part: tuple[int, int] = (0, 1), named_in: Sequence[str] | None = None
    ) -> tuple[list[str], str]:
        """What this process finds wrong with a share of a checkpoint's files, and what it could not look at.

        Args:
            named_in: only the files that these texts name.
        """
        try:
            entries = read_manifest(path)
            if named_in is not None:
                entries = {name: one for name, one in entries.items() if any(str(path / name) in t for t in named_in)}
            return find_problems(path, entries, part), ""
        except ValueError as error:
            return [str(error)], ""
        except OSError as error:
            return [], str(error)

    def _tell_damage(self, path: Path, problems: list[str]) -> None:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        kept = "it stays where it is"
        if not self._section.load_only:
            with suppress(OSError):  # a folder that nothing can be renamed in
                kept = f"set aside as {set_aside(path).name}"
        log.warning("checkpoint %s is not whole: %s%s; %s", path.name, problems[0], more, kept)

    def load(self, found: Found, tensors: Mapping[str, Slices]) -> None:
        """Fills the tensors of this process from a checkpoint, once names, shapes and dtypes are those of the run.

        Raises:
            ValueError: they are not; nothing has been loaded.
        """
        # What this run has none of may always be left behind.
        unused = frozenset(self._section.exclude_from_loading) - {part_of(name) for name in tensors}
        ignored = found.excluded | unused if found.train_state else frozenset(PARTS)
        entries = tensor_entries(read_metadata(found.path))
        check_tensors(found.path, entries, tensors, ignored, may_cast=not found.train_state)
        load_checkpoint(found.path, tensors, self._group)

    def is_due(self, step: int, is_last: bool) -> bool:
        """Whether the configuration wants this step to be saved."""
        return self._section.is_due(step, is_last)

    def is_overdue(self) -> bool:
        """Whether the last save is interval_minutes ago, by this process's clock."""
        waited = time.monotonic() - self._last_save
        return self.saves and 0 < self._section.interval_minutes * 60 <= waited

    def save(self, step: int, tensors: Mapping[str, Slices], train_state: Mapping[str, Any]) -> None:
        """Saves what the tensors are now. A save that fails is told, and training goes on.

        Raises:
            CheckpointError: it was the third in a row.
        """
        self._settle()
        has_ema = any(part_of(name) == "ema" for name in tensors)
        if started_anew := self._started_anew - (set() if has_ema else {"ema"}):
            train_state = {**train_state, "started_anew": sorted(started_anew)}
        self._last_save = time.monotonic()
        is_async = self._section.async_mode != "disabled"
        kept: Mapping[str, Slices] | Exception
        try:
            kept = self._stage(tensors) if is_async else tensors
        except Exception as error:  # no memory for the copy: told like any failed save, and on all processes
            kept = error
        final, group = step_path(self._folder, step), self._group
        self._save = BackgroundSave(
            step, lambda: save_checkpoint(final, kept, train_state, group, then=self._remove_expired)
        )
        if not is_async:
            self._settle()

    def poll(self) -> None:
        """Tells how a save in the background has ended; to be called after every step."""
        if self._save is not None and self._save.is_done():
            self._tell(self._save)

    def finish(self) -> None:
        """Waits for the last save.

        Raises:
            CheckpointError: it failed, so that the run has no checkpoint of its end.
        """
        self._settle()
        if self._failed:
            raise CheckpointError(f"the last checkpoint could not be saved to {self._folder}: see the errors above")

    def close(self) -> None:
        """Gives a save that is under way when the run ends early the chance to become whole, and tells how it went."""
        if self._save is not None:
            self._save.wait(CLOSE_SECONDS)
            self.poll()
            if not self._save.is_done():
                text = "checkpoint of step %d was not finished within %g s and is given up"
                log.warning(text, self._save.step, CLOSE_SECONDS)

    def _settle(self) -> None:
        """Waits for the latest save and counts it. Here and not in `poll`, where processes could be at other steps."""
        if (save := self._save) is None:
            return
        save.wait()
        self._save = None  # not before: a signal may end the wait, and `close` goes on with it
        self._tell(save)
        self._failed = self._failed + 1 if save.error else 0
        if self._failed >= MAX_FAILED_SAVES:
            raise CheckpointError(
                f"{self._failed} saves in a row have failed, the last at step {save.step}: {explain(save.error)}"
            )

    def _tell(self, save: BackgroundSave) -> None:
        if save.is_told:
            return
        save.is_told = True
        if save.error:
            room = ""
            with suppress(OSError):  # the disk itself may be gone
                room = f"{shutil.disk_usage(self._folder).free / 2**30:.1f} GiB are free; "
            text = "checkpoint of step %d FAILED: %s; %straining goes on, the next save tries again"
            log.error(text, save.step, explain(save.error), room)
        else:
            self.longest_save = max(self.longest_save, save.seconds)
            log.info("step %d: checkpoint in %s, %.1f s", save.step, step_path(self._folder, save.step), save.seconds)

    def _remove_expired(self) -> None:
        """Runs once a newer checkpoint is safe. What cannot be deleted now is no reason to call that one failed."""
        try:
            remove_expired(self._folder, self._section.keep_latest_k, self._section.keep_every)
        except OSError as error:
            log.warning("an old checkpoint could not be deleted: %s", error)

    def _gather(self, value: Any) -> list[Any]:
        """Every process's value, on all of them."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _agree(self, value: Any) -> Any:
        """The first process's value, on all of them: what a folder holds is not seen everywhere at the same moment."""
        return self._gather(value)[0]
