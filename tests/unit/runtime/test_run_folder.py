import multiprocessing

import pytest

from runtime.run_folder import claim_run_folder


def test_a_free_name_is_taken_and_parents_are_made(tmp_path):
    folder = claim_run_folder(tmp_path / "outputs" / "tiny")
    assert folder == tmp_path / "outputs" / "tiny"
    assert folder.is_dir()


def test_a_used_folder_leads_to_the_next_free_name(tmp_path):
    wanted = tmp_path / "tiny"
    assert [claim_run_folder(wanted).name for _ in range(3)] == ["tiny", "tiny-2", "tiny-3"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "notes.txt").write_text("mine")
    assert claim_run_folder(tmp_path / "old").name == "old-2"
    assert (tmp_path / "old" / "notes.txt").read_text() == "mine"


def test_an_empty_folder_is_free(tmp_path):
    (tmp_path / "mounted").mkdir()
    assert claim_run_folder(tmp_path / "mounted") == tmp_path / "mounted"


def test_processes_that_claim_at_once_get_different_folders(tmp_path):
    (tmp_path / "run").mkdir()
    with multiprocessing.get_context("fork").Pool(8) as pool:
        folders = pool.map(claim_run_folder, [tmp_path / "run"] * 32, chunksize=1)
    assert len(set(folders)) == 32


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for wanted in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"job\.dump_folder='.*file.*' must be a folder.*--job\.dump_folder"):
            claim_run_folder(wanted)


def test_a_run_that_ended_before_its_first_step_leaves_its_name_free(tmp_path):
    folder = claim_run_folder(tmp_path / "run")
    (folder / "exit.json").write_text("{}")
    assert claim_run_folder(tmp_path / "run") == folder
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "exit.json").write_text("{}")
    assert claim_run_folder(tmp_path / "run").name == "run-2"


def test_the_folder_it_is_called_in_has_a_name_too(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert claim_run_folder(".") == tmp_path / "here"
    assert claim_run_folder(".") == tmp_path / "here-2"


def test_the_root_is_refused():
    with pytest.raises(ValueError, match=r"job\.dump_folder='/' must be a folder"):
        claim_run_folder("/")
