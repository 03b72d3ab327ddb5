"""What machines of a run must have in common, from what their ranks say."""

from pathlib import Path

import pytest

import runtime.preflight
from runtime.preflight import (
    Probe,
    Report,
    Sight,
    describe_machines,
    describe_ranks,
    find_other_clocks,
    find_other_versions,
    find_unshared,
    gather_problems,
    hash_code,
    nearest_folder,
    read_package_versions,
)

VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "code": "a1"}


def reports(*hosts: str, problems: dict[int, list[str]] | None = None, **versions: str) -> list[Report]:
    """One of each rank; the versions are the last one's."""
    made = [
        Report(host, f"boot of {host}", (problems or {}).get(rank, []), VERSIONS) for rank, host in enumerate(hosts)
    ]
    return [*made[:-1], made[-1]._replace(versions=VERSIONS | versions)]


def sights(*seen: bool, ahead: dict[int, float] | None = None, barred: int | None = None) -> list[Sight]:
    return [Sight(1000 + (ahead or {}).get(rank, 0), one, rank != barred) for rank, one in enumerate(seen)]


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([3], "rank 3"), (range(8, 16), "ranks 8-15"), ([0, 1, 4], "ranks 0-1, 4"), ([2, 5], "ranks 2, 5")],
)
def test_ranks_in_words(ranks, text):
    assert describe_ranks(ranks) == text


def test_machines_in_words():
    made = reports("a", "a", "b", "c", "b")
    assert describe_machines(made, [0, 1]) == "a (ranks 0-1)"
    assert describe_machines(made, [2, 3, 4]) == "b (ranks 2, 4) and 1 more machine"
    assert describe_machines(made, range(5)) == "a (ranks 0-1) and 2 more machines"


def test_machines_of_one_name_are_two_when_they_have_started_apart():
    made = [Report("job", "boot 1", ["no T5"], {}), Report("job", "boot 2", [], {})]
    assert gather_problems(made) == ["on job (rank 0): no T5"]


def test_problems():
    assert gather_problems(reports("a", "a", problems={0: ["no T5", "no CLIP"]})) == ["no T5", "no CLIP"]
    assert gather_problems(reports("a", "b", problems={0: ["no T5"], 1: ["no T5", "no CLIP"]})) == [
        "no T5",
        "on b (rank 1): no CLIP",
    ]
    assert gather_problems(reports("a", "b")) == []


def test_versions():
    assert find_other_versions(reports("a", "b", "b")) == []
    (told,) = find_other_versions(reports("a", "b", "b", torch="2.12.1", driver="580"))
    assert told.startswith("rank 2 on b has torch 2.12.1, driver 580 and rank 0 on a has torch 2.13.0, driver none: ")


def test_folders():
    made = reports("a", "a", "b", "b")
    assert find_unshared("out", made, sights(True, True, True, True)) == []
    (told,) = find_unshared("out", made, sights(True, True, False, False))
    assert told.startswith("job.dump_folder='out' is not shared: b (ranks 2-3) does not see what a (rank 0) wrote: ")
    (told,) = find_unshared("out", made, sights(True, True, True, True, barred=3))
    assert told.startswith("job.dump_folder='out' cannot be written by b (rank 3): ")


def test_clocks():
    made = reports("a", "a", "b", "c")
    assert find_other_clocks(made, sights(True, True, True, True, ahead={1: 4.9, 2: -4.9})) == []
    behind, ahead = find_other_clocks(made, sights(True, True, True, True, ahead={2: -60, 3: 7}))
    assert behind.startswith("the clock of b (rank 2) is 60 s behind that of a (rank 0): ")
    assert ahead.startswith("the clock of c (rank 3) is 7 s ahead of that of a (rank 0): ")


def test_a_probe_is_seen_where_it_is_written_and_nowhere_else(tmp_path, monkeypatch):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir(), theirs.mkdir()
    probe = Probe(str(ours / "run" / "of" / "today"))
    told = probe.write()
    assert [file.parent for file in tmp_path.rglob(".preflight-*")] == [ours] and probe.fault is None
    assert Probe(str(ours / "run" / "of" / "today")).look(told, 0) == (True, True)
    assert Probe(str(theirs / "run" / "of" / "today")).look(told, 0.1) == (False, True)
    assert Probe(str(tmp_path / "none" / "run" / "of" / "today")).look(told, 0) == (False, False)
    monkeypatch.chdir(ours)
    assert Probe("run/of/today").look(told, 0) == (True, True)
    probe.remove()
    assert list(ours.iterdir()) == []


def test_a_probe_that_cannot_be_written_says_what_claiming_the_folder_would(tmp_path, monkeypatch):
    monkeypatch.setattr(
        Path, "write_text", lambda *arguments: (_ for _ in ()).throw(OSError(30, "Read-only file system"))
    )
    probe = Probe(str(tmp_path))
    probe.write()
    assert "must be a folder that can be made and written to, but: [Errno 30] Read-only" in str(probe.fault)
    probe.remove()


def test_a_file_in_the_way_is_the_nearest_place(tmp_path):
    (tmp_path / "file").write_text("")
    assert nearest_folder(tmp_path / "a" / "b") == tmp_path
    assert nearest_folder(tmp_path / "file" / "b") == tmp_path / "file"
    assert not runtime.preflight.may_write(tmp_path / "file")


def test_the_word_for_the_code_changes_with_the_code_and_only_with_it(tmp_path):
    (tmp_path / "flux").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "train.py").write_text("a = 1\n")
    (tmp_path / "flux" / "model.py").write_text("b = 1\n")
    first = hash_code(tmp_path)
    (tmp_path / "tests" / "test_model.py").write_text("c = 1\n")
    (tmp_path / "notes.txt").write_text("d")
    assert hash_code(tmp_path) == first
    (tmp_path / "flux" / "model.py").write_text("b = 2\n")
    assert hash_code(tmp_path) != first
    (tmp_path / "flux" / "model.py").write_text("b = 1\n")
    assert hash_code(tmp_path) == first


def test_versions_of_this_machine(tmp_path, monkeypatch):
    found = read_package_versions()
    assert {"python", "torch", "transformers", "safetensors", "numpy", "code"} <= found.keys()
    assert "none" not in found.values()
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27\n")
    monkeypatch.setattr(runtime.preflight, "DRIVER", tmp_path / "version")
    assert read_package_versions.__wrapped__()["driver"] == "580.65.06"


def test_the_rooms_are_those_of_the_house():
    rooms = {file.parent.name for file in runtime.preflight.PROJECT.glob("*/__init__.py")}
    assert rooms - {"scripts", "tests", "benchmarks"} == set(runtime.preflight.ROOMS)
