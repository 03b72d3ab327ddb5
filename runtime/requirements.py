"""What a requirements file asks of the Python that runs this. Only installed metadata is read: nothing is imported."""

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

OLDEST_PYTHON = (3, 11)


class Requirement(NamedTuple):
    """One `name==pin  # serves from floor` line. Versions are tuples of their leading numbers."""

    name: str
    floor: tuple[int, ...]
    pin: tuple[int, ...]


def release(text: str) -> tuple[int, ...]:
    """The numbers a version starts with: `2.13.0+cpu` and `2.13.0a0+git` are both (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(number) for number in match[0].split(".")) if match else ()


def read_requirements(path: Path) -> list[Requirement]:
    """The pinned lines of a requirements file and of the files it includes with `-r`."""
    requirements = []
    for line in path.read_text().splitlines():
        if included := re.match(r"-r\s+(\S+)", line):
            requirements += read_requirements(path.parent / included[1])
        elif pinned := re.match(r"([\w.-]+)==(\S+)", line):
            pin = release(pinned[2])
            floor = re.search(r"#.*\bserves from ([\d.]+)", line)
            requirements.append(Requirement(pinned[1], release(floor[1]) if floor else pin[:2], pin))
    return requirements


def check_requirement(requirement: Requirement) -> str | None:
    """What is wrong with the installed version, or None."""
    name, floor, pin = requirement
    try:
        text = version(name)
    except PackageNotFoundError:
        return f"{name} is missing"
    if floor <= release(text) < (pin[0] + 1,):
        return None
    return f"{name} {text} is not in {'.'.join(map(str, floor))} .. {pin[0]}.x"
