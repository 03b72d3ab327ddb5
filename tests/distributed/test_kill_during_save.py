"""kill -9 at any moment of a save: what is visible is whole, and at most one interval is lost.

100 kills at random moments in sync and async saves of two processes. `SAVE_KILLS=1000` in the environment makes it
another number, and `SAVE_KILLS_SEED` another sequence of moments.
"""

import os
import random
import shutil
import time
from pathlib import Path

import pytest

from checkpoint.manifest import find_problems, read_manifest, save_manifest
from checkpoint.steps import find_steps
from tests.distributed.mortal_ranks import WORLD, MortalRanks
from tests.unit.checkpoint.saves import build, save, save_steps, wrong_tensors

KILLS = int(os.environ.get("SAVE_KILLS", "100"))
SEED = int(os.environ.get("SAVE_KILLS_SEED", "0"))
LONGEST = 5  # saves from the first to the kill, by the time that one takes here and now
WITHIN_A_SAVE = 0.25  # least share of the kills that leave a half-done save; measured: 0.8
FOREVER = 10**6
KEPT = 2

pytestmark = pytest.mark.slow


def check_folder(folder: Path) -> int:
    """All that is visible is whole and right. Returns the newest step."""
    steps = find_steps(folder)
    for step, path in steps.items():
        assert find_problems(path, read_manifest(path)) == [], path
        assert wrong_tensors(path, step) == [], path
    assert not list(folder.glob("damaged-*"))
    return max(steps, default=0)


def half_done(folder: Path) -> list[Path]:
    return list(folder.glob(".*"))


def step_of(line: str) -> int:
    """Of the log's line that a checkpoint is there."""
    return int(line.split()[1].rstrip(":"))


def seconds_of_a_save(home: Path) -> float:
    """Of two processes that nobody kills, beside whatever else the machine has to do."""
    count = 10
    ranks = MortalRanks(home / "ranks", home / "checkpoint", {"keep_latest_k": KEPT}, FOREVER)
    ranks.await_word("committed")
    started = time.monotonic()
    ranks.await_word("committed", 1 + count)
    seconds = time.monotonic() - started
    ranks.end()
    return seconds / count


def test_random_kills(tmp_path):
    draw, folder, within, steps = random.Random(SEED), tmp_path / "checkpoint", 0, []
    longest = LONGEST * seconds_of_a_save(tmp_path / "unharmed")
    for number in range(KILLS):
        mode = draw.choice(["disabled", "async"])
        ranks = MortalRanks(tmp_path / f"round-{number}", folder, {"async_mode": mode, "keep_latest_k": KEPT}, FOREVER)
        victims = draw.choice([[0], [1], [0, 1]])
        ranks.await_word("started")
        time.sleep(draw.uniform(0, longest))
        started = [int(step) for step in ranks.told("started")]
        ranks.kill(victims)
        if draw.random() < 0.5:
            ranks.await_end()  # the other one notices by itself and does not hang
        else:
            ranks.end()
        errors = [ranks.told("error", rank) for rank in range(WORLD)]
        what = f"kill {number} of ranks {victims}, {mode}, seed {SEED}: {errors}"
        within += bool(half_done(folder))
        newest = check_folder(folder)
        # The run went on from what the round before has left, and what was promised since is there.
        assert ranks.told("found") == [str(steps[-1] if steps else 0)], what
        promised = [step_of(line) for line in ranks.told("committed")]
        assert newest >= max(promised, default=0), what
        # A save in the background may still go on when the next one is asked for, and then is waited for.
        assert newest >= max(started) - (1 if mode == "disabled" else 2), what
        assert len(find_steps(folder)) >= min(KEPT, newest), what
        steps.append(newest)
        shutil.rmtree(tmp_path / f"round-{number}")
    print(f"{KILLS} kills within {longest:.2f} s, {within} within a save, {steps[-1]} steps")
    assert within >= WITHIN_A_SAVE * KILLS, f"only {within} of {KILLS} kills came within a save"
    assert steps[-1] > KILLS / 2


@pytest.fixture(scope="module")
def points(tmp_path_factory) -> list[list[str]]:
    """Of each rank: all points of its save of step 4, with which step 2 expires."""
    home = tmp_path_factory.mktemp("points")
    save_steps(home / "checkpoint", 2, 3)
    ranks = MortalRanks(home / "ranks", home / "checkpoint", {"keep_latest_k": KEPT}, 1, dies_at={0: 999, 1: 999})
    assert ranks.await_end() == [0, 0]
    return [ranks.told("point", rank) for rank in range(WORLD)]


def test_the_points_are_those_of_the_commit(points):
    """So that the kills below are where they are thought to be."""
    first, second = points
    new, made = "/.unfinished-step-4", "/step-4"
    order = [
        f"fsync {new}/__0_0.distcp",
        f"os.rename {new}/.metadata.tmp",
        f"open {new}/train_state.json",
        f"fsync {new}/.metadata",
        f"open {new}/manifest.json",
        f"fsync {new}/manifest.json",
        f"fsync {new}",
        f"os.rename {new}",
        "fsync ",
        "os.rename /step-2",
        "os.remove",
        "os.rmdir /.expired-step-2",
        "end",
    ]
    assert [name for name in order if name not in first] == []
    assert [first.index(name) for name in order] == sorted(first.index(name) for name in order)
    assert not any(made in name for name in first + second), "something is done to a visible checkpoint"
    assert [point.split()[0] for point in second].count("write") > 2 and f"fsync {new}/__1_0.distcp" in second
    assert not any("rename" in name for name in second)


@pytest.mark.parametrize("victim", range(WORLD))
def test_a_kill_at_every_point(points, tmp_path, victim):
    save_steps(tmp_path / "template", 2, 3)
    for number, point in enumerate(points[victim]):
        folder = tmp_path / f"checkpoint-{number}"
        shutil.copytree(tmp_path / "template", folder)
        home = tmp_path / f"ranks-{number}"
        ranks = MortalRanks(home, folder, {"keep_latest_k": KEPT}, 1, dies_at={victim: number})
        ranks.await_any_end()
        ranks.end()
        told = ranks.told("point", victim)
        assert told == points[victim][: number + 1], "the kill was elsewhere"
        visible = check_folder(folder)
        is_made = victim == 0 and "os.rename /.unfinished-step-4" in told[:-1]
        assert visible in ([4] if is_made else [3, 4] if victim == 1 and point == "end" else [3]), point
        # The next run goes on from there, saves the same step again where it must, and clears what was left.
        checkpointer = build(folder, keep_latest_k=KEPT)
        assert half_done(folder) == [], point
        found = checkpointer.find()
        assert found is not None and found.step == visible, point
        for step in range(visible + 1, 6):
            save(checkpointer, step)
        checkpointer.finish()
        assert check_folder(folder) == 5 and list(find_steps(folder)) == [4, 5], point
        assert half_done(folder) == [], point


def test_control_a_save_into_the_visible_folder_is_seen(points, tmp_path):
    save_steps(tmp_path / "checkpoint", 2, 3)
    place = next(number for number, point in enumerate(points[0]) if point.startswith("write"))
    ranks = MortalRanks(tmp_path / "ranks", tmp_path / "checkpoint", {}, 1, dies_at={0: place}, in_place=True)
    ranks.await_any_end()
    ranks.end()
    with pytest.raises(ValueError, match=r"step-4/manifest\.json is missing"):
        check_folder(tmp_path / "checkpoint")


def test_control_a_mixture_of_two_saves_is_seen(tmp_path):
    """What re-saving in place could leave; hashes alone would not tell."""
    folder = tmp_path / "checkpoint"
    ranks = MortalRanks(tmp_path / "ranks", folder, {}, 2)
    assert ranks.await_end() == [0, 0]
    assert check_folder(folder) == 2
    shutil.copy(folder / "step-1" / "__1_0.distcp", folder / "step-2")
    entries = read_manifest(folder / "step-2") | {"__1_0.distcp": read_manifest(folder / "step-1")["__1_0.distcp"]}
    (folder / "step-2" / "manifest.json").unlink()
    save_manifest(folder / "step-2", entries)
    assert find_problems(folder / "step-2", entries) == []
    assert "layers.0.weight" in wrong_tensors(folder / "step-2", 2)
