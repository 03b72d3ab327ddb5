"""A damaged checkpoint is found before a weight is touched, named, and the next older one is taken."""

import errno
import logging
import random
import shutil

import pytest
import torch

import checkpoint.manifest
from checkpoint.dcp import TRAIN_STATE, open_checkpoint
from checkpoint.errors import CheckpointError
from checkpoint.manifest import MANIFEST, read_manifest
from checkpoint.safe_metadata import METADATA
from tests.unit.checkpoint.saves import build, make_zeros, save_steps, share, wrong_tensors

FILES = (METADATA, "__0_0.distcp", TRAIN_STATE, MANIFEST)  # one of each class
FLIPS = 200


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two checkpoints of a run; every test damages a copy."""
    folder = tmp_path_factory.mktemp("whole")
    save_steps(folder, 10, 20)
    assert sorted(file.name for file in (folder / "step-20").iterdir()) == sorted(FILES)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def check_falls_back(folder, caplog):
    """The run starts from step 10, the log names the bad file of step 20, and that one is kept aside."""
    caplog.clear()
    checkpointer = build(folder)
    with caplog.at_level(logging.WARNING):
        found = checkpointer.find()
    assert found is not None and found.step == 10
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "step-20 is not whole" in caplog.text and "set aside as damaged-step-20" in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == ["damaged-step-20", "step-10"]
    tensors = make_zeros()
    checkpointer.load(found, share(tensors))
    assert wrong_tensors(found.path, 10) == []


def check_is_refused(folder):
    """Whoever asks for step 20 by name gets one line, and nothing that could be loaded from."""
    run = build(folder, load_step=20, load_only=True)
    for ask in (run.find, lambda: open_checkpoint(folder / "step-20")):
        with pytest.raises(ValueError, match=r"step-20") as error:
            ask()
        assert "\n" not in str(error.value)


def flip(path, place, change):
    content = bytearray(path.read_bytes())
    content[place] ^= change
    path.write_bytes(content)


def test_every_flipped_byte_is_found(whole, folder, caplog):
    draw = random.Random(0)
    files = {name: (whole / "step-20" / name).stat().st_size for name in FILES}
    for number in range(FLIPS):
        # Every other flip is anywhere; in turn the others hit each file, of which some are small.
        anywhere = draw.choices(list(files), weights=files.values())[0]
        name = anywhere if number % 2 else FILES[number // 2 % len(FILES)]
        place, change = draw.randrange(files[name]), draw.randrange(1, 256)
        flip(folder / "step-20" / name, place, change)
        check_is_refused(folder)
        if number % 10 == 0:
            check_falls_back(folder, caplog)
            (folder / "damaged-step-20").rename(folder / "step-20")
        flip(folder / "step-20" / name, place, change)
    assert build(folder).find().step == 20  # the flips back were exact, and whole ones are taken


def test_another_line_end_in_the_manifest_is_found(folder):
    manifest = folder / "step-20" / MANIFEST
    manifest.write_bytes(manifest.read_bytes().replace(b"\n", b"\r", 1))
    check_is_refused(folder)


def cut(content: bytes, kind: str) -> bytes:
    size = {"empty": 0, "one byte": 1, "half": len(content) // 2, "all but one": len(content) - 1}
    return content[: size[kind]] if kind in size else content + b"\0"


@pytest.mark.parametrize("kind", ["empty", "one byte", "half", "all but one", "one more"])
@pytest.mark.parametrize("name", FILES)
def test_files_of_another_length_are_found(folder, caplog, name, kind):
    path = folder / "step-20" / name
    path.write_bytes(cut(path.read_bytes(), kind))
    check_is_refused(folder)
    check_falls_back(folder, caplog)


@pytest.mark.parametrize("name", FILES)
def test_missing_files_are_found(folder, caplog, name):
    (folder / "step-20" / name).unlink()
    if name != MANIFEST:  # a folder without one may be another recipe's
        check_is_refused(folder)
    check_falls_back(folder, caplog)


@pytest.mark.parametrize("name", FILES)
def test_files_of_zeros_are_found(folder, caplog, name):
    path = folder / "step-20" / name
    path.write_bytes(bytes(path.stat().st_size))
    check_is_refused(folder)
    check_falls_back(folder, caplog)


@pytest.mark.parametrize("name", FILES)
def test_links_in_place_of_files_are_found(folder, caplog, tmp_path, name):
    path = folder / "step-20" / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    check_is_refused(folder)
    check_falls_back(folder, caplog)


def test_the_file_of_another_save_is_found(folder, caplog):
    shutil.copy(folder / "step-10" / "__0_0.distcp", folder / "step-20")
    check_is_refused(folder)
    check_falls_back(folder, caplog)


@pytest.mark.parametrize("kind", ["a file", "an empty folder"])
def test_what_is_no_checkpoint_at_all_is_found(folder, caplog, kind):
    shutil.rmtree(folder / "step-20")
    if kind == "a file":
        (folder / "step-20").write_text("not a folder")
    else:
        (folder / "step-20").mkdir()
    check_falls_back(folder, caplog)


def test_control_without_the_manifest_flipped_weights_are_loaded(folder):
    """What torch itself does about it: nothing. So the tests above see the manifest at work."""
    shard = folder / "step-20" / "__0_0.distcp"
    weights = torch.arange(8 * 24) + (20 << 32)
    flip(shard, shard.read_bytes().index(weights.numpy().tobytes()), 1)
    assert wrong_tensors(folder / "step-20", 20) == ["layers.0.weight"]


def test_a_run_with_nothing_but_damaged_checkpoints_stops(folder):
    for step in (10, 20):
        flip(folder / f"step-{step}" / "__0_0.distcp", 100, 1)
    for _ in range(2):  # a job script starts it again: it must not find an empty folder then, and begin anew
        with pytest.raises(CheckpointError, match=r"2 checkpoints and none is whole, .*step-20/__0_0\.distcp") as error:
            build(folder).find()
        assert "\n" not in str(error.value)
        assert {path.name for path in folder.iterdir()} == {"step-10", "step-20"}  # nothing was touched


def test_a_disk_that_does_not_answer_is_no_damage(folder, monkeypatch):
    def fail(path):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(checkpoint.manifest, "make_entry", fail)
    with pytest.raises(CheckpointError, match=r"step-20 cannot be read: .*Stale file handle: nothing was changed"):
        build(folder).find()
    assert {path.name for path in folder.iterdir()} == {"step-10", "step-20"}


def test_a_run_that_only_loads_leaves_damaged_checkpoints_where_they_are(folder, caplog):
    flip(folder / "step-20" / "__0_0.distcp", 100, 1)
    assert build(folder, load_only=True).find().step == 10
    assert "it stays where it is" in caplog.text
    assert {path.name for path in folder.iterdir()} == {"step-10", "step-20"}


def test_a_damaged_start_of_another_run_is_refused(folder, tmp_path):
    flip(folder / "step-20" / "__0_0.distcp", 100, 1)
    for model_only in (True, False):
        run = build(tmp_path / "new", initial_load_path=str(folder / "step-20"), initial_load_model_only=model_only)
        with pytest.raises(ValueError, match=r"initial_load_path: .*__0_0\.distcp is damaged"):
            run.find()


def test_the_manifest_names_every_other_file(whole):
    assert set(read_manifest(whole / "step-20")) == set(FILES) - {MANIFEST}
