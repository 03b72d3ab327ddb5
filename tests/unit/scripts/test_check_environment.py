from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from runtime import requirements as reader
from runtime.requirements import read_requirements, release
from scripts import check_environment
from scripts.check_environment import main

ROOT = Path(__file__).parents[3]


@pytest.fixture
def installed(monkeypatch):
    """A dict that stands for the environment: name -> version."""
    versions = {}

    def version(name):
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(reader, "version", version)
    return versions


@pytest.fixture
def requirements(tmp_path):
    (tmp_path / "base.txt").write_text("# a comment\ntorch==2.13.0  # serves from 2.11\nwandb==0.31.0\n")
    (tmp_path / "dev.txt").write_text("-r base.txt\npytest==9.2.0  # the runner, serves from 8.0\n")
    return tmp_path


def test_requirements_are_read_with_what_they_include(requirements):
    assert read_requirements(requirements / "dev.txt") == [
        ("torch", (2, 11), (2, 13, 0)),
        ("wandb", (0, 31), (0, 31, 0)),
        ("pytest", (8, 0), (9, 2, 0)),
    ]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("2.13.0+cpu", (2, 13, 0)), ("2.11.0a0+git12.nv26", (2, 11, 0)), ("2026.1", (2026, 1)), ("unknown", ())],
)
def test_a_version_is_its_leading_numbers(text, numbers):
    assert release(text) == numbers


@pytest.mark.parametrize("torch", ["2.13.0", "2.13.0+cpu", "2.11.0", "2.11.0a0+git12", "2.15.1"])
def test_versions_in_range_serve(installed, requirements, capsys, torch):
    installed.update(torch=torch, wandb="0.32.1")
    assert main(str(requirements / "base.txt")) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("versions", "reason"),
    [
        ({"torch": "2.10.1", "wandb": "0.31.0"}, "torch 2.10.1 is not in 2.11 .. 2.x"),
        ({"torch": "3.0.0", "wandb": "0.31.0"}, "torch 3.0.0 is not in 2.11 .. 2.x"),
        ({"torch": "2.13.0", "wandb": "0.30.9"}, "wandb 0.30.9 is not in 0.31 .. 0.x"),
        ({"torch": "2.13.0"}, "wandb is missing"),
    ],
)
def test_what_does_not_serve_is_named(installed, requirements, capsys, versions, reason):
    installed.update(versions)
    assert main(str(requirements / "base.txt")) == 1
    assert capsys.readouterr().out.endswith(f"base.txt: {reason}\n")


def test_an_environment_without_torch_was_not_meant_and_is_passed_by_in_silence(installed, requirements, capsys):
    installed.update(wandb="0.31.0")
    assert main(str(requirements / "base.txt")) == 1
    assert capsys.readouterr().out == ""


def test_an_old_python_does_not_serve(installed, requirements, monkeypatch, capsys):
    installed.update(torch="2.13.0", wandb="0.31.0")
    monkeypatch.setattr(check_environment.sys, "version_info", (3, 10, 13))
    assert main(str(requirements / "base.txt")) == 1
    assert "is older than 3.11" in capsys.readouterr().out


def test_the_files_of_the_repository_pin_every_line():
    for name in ("requirements.txt", "requirements-dev.txt"):
        lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith(("#", "-r"))]
        own = [
            requirement for requirement in read_requirements(ROOT / name) if any(requirement.name in x for x in lines)
        ]
        assert len(own) >= len(lines)
        for requirement in own:
            assert requirement.floor <= requirement.pin and len(requirement.pin) >= 2, requirement
