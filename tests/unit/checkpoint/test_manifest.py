"""The list of files: exact, and found out when it is not."""

import json

import pytest

from checkpoint.manifest import (
    MANIFEST,
    FileEntry,
    find_problems,
    is_plain_name,
    make_entry,
    read_manifest,
    save_manifest,
)

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # SHA-256 of no bytes, FIPS 180-4


@pytest.fixture
def folder(tmp_path):
    for number in range(5):
        (tmp_path / f"file-{number}").write_bytes(bytes([number]) * (1000 + number))
    save_manifest(tmp_path, {path.name: make_entry(path) for path in tmp_path.iterdir()})
    return tmp_path


def test_an_entry_is_size_and_sha256(tmp_path):
    (tmp_path / "empty").touch()
    assert make_entry(tmp_path / "empty") == make_entry(tmp_path / "empty", sync=True) == FileEntry(0, EMPTY)


def test_what_was_saved_is_read(folder):
    entries = read_manifest(folder)
    assert sorted(entries) == [f"file-{number}" for number in range(5)]
    assert find_problems(folder, entries) == []


def test_a_manifest_is_not_written_over(folder):
    with pytest.raises(FileExistsError):
        save_manifest(folder, {})


def test_processes_share_the_files_and_miss_none(folder):
    looked_at: list[list[str]] = [[], [], []]
    for process, names in enumerate(looked_at):
        find_problems(folder, read_manifest(folder), (process, 3), names.append)
    assert [len(names) for names in looked_at] == [2, 2, 1]
    assert sorted(name for names in looked_at for name in names) == sorted(read_manifest(folder))


def test_every_problem_is_one_line_that_names_the_file(folder):
    (folder / "file-0").unlink()
    (folder / "file-1").write_bytes(b"short")
    (folder / "file-2").write_bytes(b"\3" * 1002)
    (folder / "file-3").unlink()
    (folder / "file-3").mkdir()
    problems = find_problems(folder, read_manifest(folder))
    assert [problem.removeprefix(f"{folder}/") for problem in problems] == [
        "file-0 is missing",
        "file-1 has 5 bytes and must have 1001",
        f"file-2 is damaged: its SHA-256 is not the one in {MANIFEST}",
        "file-3 is no plain file: links are not followed",
    ]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[]",
        "null",
        '{"files": []}',
        '{"files": {"a": 1}}',
        '{"files": {"a": {"bytes": 1}}}',
        '{"files": {"a": {"bytes": 1, "sha256": "x", "more": 1}}}',
        "[" * 100_000,
    ],
)
def test_what_is_no_manifest_is_damaged(folder, content):
    (folder / MANIFEST).write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        read_manifest(folder)


def test_a_list_that_was_changed_is_damaged(folder):
    content = json.loads((folder / MANIFEST).read_text())
    del content["files"]["file-0"]
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")
    with pytest.raises(ValueError, match="is damaged"):
        read_manifest(folder)


def test_no_manifest(tmp_path):
    with pytest.raises(ValueError, match=r"manifest\.json is missing"):
        read_manifest(tmp_path)


def test_plain_names():
    assert all(map(is_plain_name, ["a", ".metadata", "__0_0.distcp", "...", "a b"]))
    assert not any(map(is_plain_name, ["", ".", "..", "/", "/a", "a/", "a/b", "../a", "./a", "a\\b"]))
