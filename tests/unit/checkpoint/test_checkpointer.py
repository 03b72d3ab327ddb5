"""What a run saves and when, what stays, and what it goes on from."""

import errno
import logging
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

import checkpoint.checkpointer as checkpointer_module
import checkpoint.dcp
import checkpoint.safe_metadata
import checkpoint.steps
from checkpoint.background import BackgroundSave
from checkpoint.checkpointer import Checkpointer, Found
from checkpoint.config import Checkpoint
from checkpoint.dcp import read_train_state
from checkpoint.errors import CheckpointError
from checkpoint.manifest import find_problems, read_manifest
from checkpoint.slices import Slices
from checkpoint.steps import find_steps
from tests.unit.checkpoint.saves import SHAPES, build, make_values, make_zeros, save, save_steps, share, wrong_tensors

ASYNC_MODES = ["async", "async_with_pinned_mem"]


def loaded(checkpointer: Checkpointer, found: Found) -> dict[str, torch.Tensor]:
    """The tensors that a run which asks for all that `found` holds gets."""
    tensors = {
        name: tensor
        for name, tensor in make_zeros().items()
        if name.split(".")[0] not in ("optimizer", "ema") or found.holds(name.split(".")[0])
    }
    checkpointer.load(found, share(tensors))
    return tensors


# When


@pytest.mark.parametrize(
    ("keys", "due"),
    [
        ({"interval": 3}, [3, 6, 7]),
        ({"interval": 100}, [7]),  # the last step always
        ({"interval": 3, "enable_first_step_checkpoint": True}, [1, 3, 6, 7]),
        ({"interval": 1}, [1, 2, 3, 4, 5, 6, 7]),
        ({"interval": 1, "load_only": True}, []),
    ],
)
def test_steps_that_are_saved(tmp_path, keys, due):
    checkpointer = build(tmp_path / "checkpoint", **keys)
    assert [step for step in range(1, 8) if checkpointer.is_due(step, step == 7)] == due


def test_a_run_without_checkpoints_saves_none_and_makes_no_folder(tmp_path):
    checkpointer = Checkpointer(tmp_path / "checkpoint", Checkpoint(interval=1, interval_minutes=0.001), None)
    assert not checkpointer.is_due(1, True) and not checkpointer.is_overdue() and checkpointer.find() is None
    assert not (tmp_path / "checkpoint").exists()


def test_minutes(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(checkpointer_module.time, "monotonic", lambda: clock[0])
    checkpointer = build(tmp_path / "checkpoint", interval_minutes=2.0)
    never = build(tmp_path / "other")
    only_loads = build(tmp_path / "other", interval_minutes=2.0, load_only=True)
    for seconds, overdue in ((0, False), (119, False), (120, True), (500, True)):
        clock[0] = 1000 + seconds
        assert checkpointer.is_overdue() == overdue
        assert not never.is_overdue() and not only_loads.is_overdue()
    save(checkpointer, 1)
    assert not checkpointer.is_overdue()
    clock[0] += 120
    assert checkpointer.is_overdue()


# What


def test_what_was_saved_is_found_and_loaded(tmp_path):
    save_steps(tmp_path, 5, 20, 10)  # the highest counts, not the latest
    checkpointer = build(tmp_path)
    found = checkpointer.find()
    assert (found.step, found.samples_seen, found.path) == (20, 200, tmp_path / "step-20")
    assert read_train_state(found.path) == {"format": 1, "step": 20, "samples_seen": 200}
    assert {name: tuple(tensor.shape) for name, tensor in found.weights().items()} == {
        name: shape for name, shape in SHAPES.items() if name.startswith("layers")
    }
    values = make_values(20)
    for name, tensor in loaded(checkpointer, found).items():
        assert torch.equal(tensor, values[name]), name


@pytest.mark.parametrize("mode", ASYNC_MODES)
def test_what_changes_after_the_call_is_not_in_the_checkpoint(tmp_path, monkeypatch, mode):
    """Training goes on while the checkpoint is written."""
    may_write, original = threading.Event(), checkpointer_module.save_checkpoint

    def delayed(*args, **kwargs):
        assert may_write.wait(10)
        original(*args, **kwargs)

    monkeypatch.setattr(checkpointer_module, "save_checkpoint", delayed)
    checkpointer, tensors, state = build(tmp_path, async_mode=mode), make_values(1), {"step": 1}
    checkpointer.save(1, share(tensors), state)
    for tensor in tensors.values():
        tensor.zero_()
    assert find_steps(tmp_path) == {}
    may_write.set()
    checkpointer.finish()
    assert wrong_tensors(tmp_path / "step-1", 1) == []


def test_the_next_save_waits_for_the_one_before(tmp_path, monkeypatch):
    running, most, original = [], [], checkpointer_module.save_checkpoint

    def watched(*args, **kwargs):
        running.append(1)
        most.append(len(running))
        original(*args, **kwargs)
        running.pop()

    monkeypatch.setattr(checkpointer_module, "save_checkpoint", watched)
    checkpointer = build(tmp_path, async_mode="async")
    for step in range(1, 6):
        save(checkpointer, step)
    checkpointer.finish()
    assert most == [1] * 5 and list(find_steps(tmp_path)) == [1, 2, 3, 4, 5]
    assert all(wrong_tensors(path, step) == [] for step, path in find_steps(tmp_path).items())


def test_a_save_in_the_background_is_told_once(tmp_path, caplog):
    checkpointer = build(tmp_path, async_mode="async")
    with caplog.at_level(logging.INFO, "checkpoint"):
        save(checkpointer, 1)
        checkpointer._save.wait()
        checkpointer.poll()
        told = [record.getMessage() for record in caplog.records]
        checkpointer.poll()
        checkpointer.finish()
    assert len(told) == 1 and told[0].startswith(f"step 1: checkpoint in {tmp_path / 'step-1'}")
    assert [record.getMessage() for record in caplog.records] == told


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_step_that_is_there_is_not_written_over(tmp_path, caplog, mode):
    save_steps(tmp_path, 5)
    before = {file.name: file.read_bytes() for file in (tmp_path / "step-5").iterdir()}
    checkpointer = build(tmp_path, async_mode=mode)
    checkpointer.save(5, share(make_values(99)), {"step": 5})
    checkpointer._settle()
    assert "step 5 FAILED" in caplog.text and "exists already" in caplog.text
    assert {file.name: file.read_bytes() for file in (tmp_path / "step-5").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-5"]


# What a run goes on from


def test_a_run_without_checkpoints_starts_anew(tmp_path):
    assert build(tmp_path).find() is None


def test_load_step(tmp_path):
    save_steps(tmp_path, 5, 10)
    assert build(tmp_path, load_step=10).find().step == 10
    for load_only in (False, True):  # what a run logs after step 5 would take the place of what is there
        with pytest.raises(ValueError, match=r"load_step=5: .*step-10 is newer and would be in the way"):
            build(tmp_path, load_step=5, load_only=load_only).find()
    with pytest.raises(ValueError, match=r"load_step=7 is not in .*: it has the steps 5, 10"):
        build(tmp_path, load_step=7).find()
    with pytest.raises(ValueError, match="it has the steps none"):
        build(tmp_path / "new", load_step=7).find()


def test_weights_of_another_run(tmp_path):
    save_steps(tmp_path / "old", 5)
    keys = {"initial_load_path": str(tmp_path / "old" / "step-5")}
    checkpointer = build(tmp_path / "new", **keys)
    found = checkpointer.find()
    assert (found.step, found.samples_seen, found.schedule_step, found.train_state) == (0, 0, 0, {})
    assert not found.holds("optimizer") and not found.holds("ema")
    assert set(loaded(checkpointer, found)) == {name for name in SHAPES if name.startswith("layers")}
    # All of it, on request; and the run's own checkpoints come first.
    whole = build(tmp_path / "new", **keys, initial_load_model_only=False).find()
    assert whole.step == 5 and whole.holds("optimizer")
    save_steps(tmp_path / "new", 8)
    assert build(tmp_path / "new", **keys).find().path == tmp_path / "new" / "step-8"
    # Also without [checkpoint].enable.
    assert Checkpointer(tmp_path / "new", Checkpoint(**keys), None).find().path == tmp_path / "old" / "step-5"


def test_another_runs_weights_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match=r"initial_load_path=.* must be a checkpoint"):
        build(tmp_path / "new", initial_load_path=str(tmp_path)).find()
    save_steps(tmp_path / "old", 5)
    for name in ("train_state.json", "manifest.json"):  # as in torchtitan's folders
        (tmp_path / "old" / "step-5" / name).unlink()
    foreign = {"initial_load_path": str(tmp_path / "old" / "step-5")}
    assert build(tmp_path / "new", **foreign).find().train_state == {}
    with pytest.raises(ValueError, match=r"has no train_state\.json"):
        build(tmp_path / "new", **foreign, initial_load_model_only=False).find()


@pytest.mark.parametrize("part", ["optimizer", "ema", "dataloader", "lr_scheduler", "train_state"])
def test_parts_that_are_left_out(tmp_path, part):
    checkpointer = build(tmp_path / "old")
    state = {"step": 6, "samples_seen": 60, "schedule_step": 6}
    checkpointer.save(6, share(make_values(6)), state)
    path = str(tmp_path / "old" / "step-6")
    keys = {"initial_load_path": path, "initial_load_model_only": False, "exclude_from_loading": [part]}
    run = build(tmp_path / "new", **keys)
    found = run.find()
    kept = {"train_state": found.step, "dataloader": found.samples_seen, "lr_scheduler": found.schedule_step}
    assert kept == {"train_state": 6, "dataloader": 60, "lr_scheduler": 6} | ({part: 0} if part in kept else {})
    prefix = f"{part}."
    assert found.holds(part) is False
    assert set(loaded(run, found)) == {name for name in SHAPES if not name.startswith(prefix)}
    # The same command again: the run has a part of its own by now, and goes on with it.
    save(run, 9)
    again = build(tmp_path / "new", **keys)
    assert again.find().holds(part) is True and again.find().step == 9


@pytest.mark.parametrize("start", ["fresh weights", "weights of another run"])
def test_what_a_new_run_has_not_taken_over_is_its_own_later(tmp_path, start):
    save_steps(tmp_path / "old", 5)
    from_elsewhere = {"initial_load_path": str(tmp_path / "old" / "step-5")} if start != "fresh weights" else {}
    keys = {**from_elsewhere, "exclude_from_loading": ["optimizer", "dataloader"]}
    run = build(tmp_path / "new", **keys)
    assert (run.find() is None) == (start == "fresh weights")
    save(run, 9)
    found = build(tmp_path / "new", **keys).find()
    assert found.holds("optimizer") and (found.step, found.samples_seen) == (9, 90)


def test_an_average_that_comes_and_goes(tmp_path, caplog):
    """Each time, the command that starts it anew or leaves it behind may be given again after a stop."""
    step = 0
    for has_average in (False, True, False, True):
        for _ in range(2):
            tensors = {name: tensor for name, tensor in make_zeros().items() if has_average or name[:4] != "ema."}
            run = build(tmp_path, exclude_from_loading=["ema"])
            if (found := run.find()) and not found.holds("ema"):
                run.load(found, share({name: tensor for name, tensor in tensors.items() if name[:4] != "ema."}))
            elif found:
                run.load(found, share(tensors))
            step += 1
            kept = {name: values for name, values in make_values(step).items() if name in tensors}
            run.save(step, share(kept), {"step": step})
        assert found.step == step - 1 and (found.holds("ema") or not has_average)
    with caplog.at_level(logging.INFO, "checkpoint"):
        build(tmp_path, exclude_from_loading=["ema"]).find()
    assert "exclude_from_loading: ema started anew before, and is gone on with now" in caplog.text


def test_the_step_cannot_start_anew_where_newer_ones_are(tmp_path):
    save_steps(tmp_path, 6)
    with pytest.raises(ValueError, match="would start at step 0 again"):
        build(tmp_path, exclude_from_loading=["train_state"]).find()


def test_nothing_is_loaded_where_something_does_not_fit(tmp_path):
    save_steps(tmp_path, 5)
    checkpointer, tensors = build(tmp_path), make_zeros()
    found = checkpointer.find()
    tensors["layers.1.bias"] = torch.zeros(1, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"layers\.1\.bias of shape \[1, 7\]"):
        checkpointer.load(found, share(tensors))
    assert not any(tensor.any() for tensor in tensors.values())


def test_names_of_another_recipe_are_told_how_to_convert(tmp_path):
    values = {f"model.{name}": values for name, values in make_values(5).items() if name.startswith("layers")}
    other = build(tmp_path / "old")
    other.save(5, share(values), {"step": 5})
    with pytest.raises(ValueError, match=r"begin with 'model\.'.*scripts\.convert_checkpoint --to dcp"):
        build(tmp_path / "new", initial_load_path=str(tmp_path / "old" / "step-5")).find()


class Ended(BaseException):
    """What a signal raises."""


@pytest.mark.parametrize(
    ("failure", "raised", "told"),
    [
        (Ended("now"), Ended, "now"),
        (KeyboardInterrupt("Ctrl-C"), KeyboardInterrupt, "Ctrl-C"),
        (OSError(errno.EIO, "Input/output error"), CheckpointError, "step-5 cannot be read: .*Input/output error: try"),
        (RuntimeError("nonsense"), ValueError, "step-5 cannot be loaded: .*nonsense: take another checkpoint"),
    ],
    ids=str,
)
def test_what_ends_a_load_is_told_as_what_it_is(tmp_path, monkeypatch, failure, raised, told):
    """By the exit code a job script decides whether to start again: a signal or a disk is no wrong configuration."""
    save_steps(tmp_path, 5)

    def fail(*args):
        raise failure

    checkpointer = build(tmp_path)
    found = checkpointer.find()
    monkeypatch.setattr(checkpoint.dcp._LoadPlanner, "create_local_plan", fail)
    with pytest.raises(raised, match=told):
        checkpointer.load(found, share(make_zeros()))


def test_a_description_that_the_disk_does_not_give_is_no_damage(tmp_path, monkeypatch):
    save_steps(tmp_path, 5)

    def fail(file):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(checkpoint.safe_metadata, "_Unpickler", fail)
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read: .*Stale file handle: try again"):
        checkpoint.safe_metadata.read_metadata(tmp_path / "step-5")


def test_no_memory_for_a_copy_is_a_failed_save(tmp_path, monkeypatch, caplog):
    checkpointer = build(tmp_path, async_mode="async")
    with monkeypatch.context() as patch:
        patch.setattr(Slices, "copied", lambda self, copy: (_ for _ in ()).throw(MemoryError("no room")))
        save(checkpointer, 1)
        checkpointer._save.wait()
    save(checkpointer, 2)
    checkpointer.finish()
    assert "checkpoint of step 1 FAILED: rank 0: MemoryError: no room" in caplog.text
    assert list(find_steps(tmp_path)) == [2] and wrong_tensors(tmp_path / "step-2", 2) == []


def test_a_save_that_is_given_up_at_the_end_is_told(tmp_path, monkeypatch, caplog):
    goes_on = threading.Event()
    monkeypatch.setattr(checkpointer_module, "save_checkpoint", lambda *args, **kwargs: goes_on.wait(10))
    monkeypatch.setattr(checkpointer_module, "CLOSE_SECONDS", 0.05)
    checkpointer = build(tmp_path, async_mode="async")
    save(checkpointer, 1)
    checkpointer.close()
    goes_on.set()
    assert "checkpoint of step 1 was not finished within 0.05 s and is given up" in caplog.text


def test_a_checkpoint_of_a_newer_recipe_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.dcp, "FORMAT", 2)
    save_steps(tmp_path, 5)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has format 2 and must have 1"):
        build(tmp_path).find()


# What stays


class Stopped(BaseException):
    """The process is killed: nothing more is done."""


@contextmanager
def broken(module: Any, name: str, error: BaseException | None = None) -> Iterator[None]:
    """A function raises, or does nothing."""

    def fail(*args, **kwargs):
        if error is not None:
            raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, fail)
        yield


class Retention(RuleBasedStateMachine):
    """Saves that succeed, fail and are killed in any order: what is visible is whole, and enough of it is there."""

    keys: dict[str, int]
    home: Path

    def __init__(self) -> None:
        super().__init__()
        self.folder = self.home / str(id(self))
        self.step, self.committed, self.failed_in_a_row = 0, [], 0
        self.start()

    def start(self) -> None:
        """A new process: it goes on from the newest checkpoint, and may save steps anew that were not reached."""
        self.checkpointer = build(self.folder, **self.keys)
        found = self.checkpointer.find()
        assert (found.step if found else 0) == max(self.committed, default=0)
        assert not list(self.folder.glob(".*"))
        self.step, self.failed_in_a_row = (found.step if found else 0), 0

    @rule(gap=st.integers(1, 3))
    def commit(self, gap: int) -> None:
        self.step += gap
        save(self.checkpointer, self.step)
        self.committed.append(self.step)
        self.failed_in_a_row = 0

    @rule(point=st.sampled_from(["make_entry", "save_text", "save_manifest", "publish"]))
    def fail(self, point: str) -> None:
        self.step += 1
        with broken(checkpoint.dcp, point, OSError(errno.ENOSPC, "No space left on device")):
            if self.failed_in_a_row == 2:
                with pytest.raises(CheckpointError, match="3 saves in a row"):
                    save(self.checkpointer, self.step)
                self.start()
            else:
                save(self.checkpointer, self.step)
                self.failed_in_a_row += 1

    @rule(point=st.sampled_from(["make_entry", "save_text", "save_manifest", "publish", "rmtree", "find_expired"]))
    def crash(self, point: str) -> None:
        self.step += 1
        module = {"rmtree": shutil, "find_expired": checkpoint.steps}.get(point, checkpoint.dcp)
        # What follows a failure would not happen after a kill.
        with broken(module, point, Stopped()), broken(checkpoint.dcp, "discard"), suppress(CheckpointError):
            save(self.checkpointer, self.step)
        if module is not checkpoint.dcp:  # old ones are removed once the new one is there
            self.committed.append(self.step)
        self.start()

    @rule()
    def restart(self) -> None:
        self.start()

    @invariant()
    def enough_is_there_and_whole(self) -> None:
        steps = find_steps(self.folder)
        for step, path in steps.items():
            assert find_problems(path, read_manifest(path)) == [] and wrong_tensors(path, step) == []
        assert set(steps) <= set(self.committed)
        latest, every = self.keys["keep_latest_k"], self.keys["keep_every"]
        assert set(steps) >= set(sorted(set(self.committed))[-latest:])
        assert set(steps) >= {step for step in self.committed if every and step % every == 0}

    def teardown(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def check_retention(home: Path, keys: dict[str, int]) -> None:
    machine = type("Machine", (Retention,), {"keys": keys, "home": home})
    few = settings(max_examples=8, stateful_step_count=12, deadline=None, database=None, phases=[Phase.generate])
    run_state_machine_as_test(machine, settings=settings(few, suppress_health_check=list(HealthCheck)))


@pytest.mark.parametrize("keys", [{"keep_latest_k": 1, "keep_every": 0}, {"keep_latest_k": 2, "keep_every": 3}])
def test_enough_checkpoints_stay_whatever_happens(tmp_path, keys):
    check_retention(tmp_path, keys)


def test_control_one_too_few_is_seen(tmp_path, monkeypatch):
    original = checkpoint.steps.find_expired
    monkeypatch.setattr(
        checkpoint.steps, "find_expired", lambda steps, latest, every: original(steps, latest - 1, every)
    )
    with pytest.raises(AssertionError):
        check_retention(tmp_path, {"keep_latest_k": 2, "keep_every": 0})


def test_all_stay_by_request(tmp_path):
    save_steps(tmp_path, *range(1, 13), keep_latest_k=0)
    assert list(find_steps(tmp_path)) == list(range(1, 13))


def test_an_old_one_that_cannot_be_deleted_is_told_and_no_failure(tmp_path, caplog, monkeypatch):
    save_steps(tmp_path, 1)

    def refuse(*args):
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr(checkpointer_module, "remove_expired", refuse)
    save_steps(tmp_path, 2, keep_latest_k=1)
    assert "an old checkpoint could not be deleted: [Errno 16] busy" in caplog.text
    assert list(find_steps(tmp_path)) == [1, 2]


def test_nothing_of_a_save_still_runs_once_it_was_waited_for():
    """Its thread is the last that holds the copies, and frees them after the save has ended."""

    class FreedSlowly:
        def __del__(self):
            time.sleep(0.3)

    go = threading.Event()
    save = BackgroundSave(1, partial(lambda _copies: go.wait(), FreedSlowly()))
    go.set()
    save.wait()
    assert save.is_done() and "checkpoint" not in [thread.name for thread in threading.enumerate()]
