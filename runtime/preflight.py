"""Before a run begins: findings about one machine, and what the machines of a run must have in common.

Nobody is asked here: ranks tell each other what they have found elsewhere. No torch.
"""

import hashlib
import os
import platform
import re
import secrets
import time
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

from runtime.run_folder import unusable

PROJECT = Path(__file__).resolve().parents[1]
ROOMS = ("checkpoint", "config", "flux", "parallel", "runtime", "training")  # whose code a run executes
PACKAGES = ("torch", "numpy", "pillow", "safetensors", "tokenizers", "transformers")
DRIVER = Path("/proc/driver/nvidia/version")
CLOCK_SECONDS = 5.0  # that clocks may differ by: more than what ranks take to answer
SEEN_SECONDS = 5.0  # for a file of another machine to appear: network file systems remember names for a while

Level = Literal["ok", "warning", "error"]


class Finding(NamedTuple):
    """What a check found."""

    level: Level
    name: str
    found: str
    fix: str = ""  # what mends it; ok has none

    def describe(self) -> str:
        return f"{self.found}: {self.fix}" if self.fix else self.found


class Report(NamedTuple):
    """What a rank says of itself."""

    host: str
    boot: str  # of the machine: containers on several may share a host name
    problems: Sequence[str]  # that it found when it looked around, for all ranks of its machine
    versions: dict[str, str]


class Sight(NamedTuple):
    """What a rank sees at the moment when all look."""

    time: float  # seconds by its clock
    sees_probe: bool
    may_write: bool  # where the probe is


def nearest_folder(folder: str | Path) -> Path:
    """A folder, or what there is of the way to it."""
    path = Path(folder).absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def may_write(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


@cache
def read_package_versions() -> dict[str, str]:
    """Of what a rank computes with: Python, packages, NVIDIA's driver where there is one, and the recipe's own code."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    if DRIVER.exists() and (match := re.search(r"\d+(\.\d+)+", DRIVER.read_text())):
        found["driver"] = match[0]
    return {**found, "code": hash_code(PROJECT)}


def hash_code(project: Path) -> str:
    """A short word that changes with any Python file that a run executes."""
    digest = hashlib.sha256()
    files = [*project.glob("*.py"), *(file for room in ROOMS for file in (project / room).rglob("*.py"))]
    for file in sorted(files):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(project).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def describe_versions(versions: dict[str, str]) -> str:
    """Such as `python 3.12.3, torch 2.13.0`."""
    return ", ".join(f"{name} {text}" for name, text in versions.items())


class Probe:
    """A file that one rank writes and all look for: it tells whether they share a folder.

    Args:
        folder: need not exist; then the nearest folder above it is looked at. A relative one counts from where each
            rank is.
    """

    def __init__(self, folder: str):
        self._folder = folder
        self._written: Path | None = None
        self.fault: ValueError | None = None  # why it could not be written

    def write(self) -> str:
        """On one rank. Returns what the others need to know to find it."""
        home, name = nearest_folder(self._folder), f".preflight-{secrets.token_hex(8)}"
        self._written = home / name
        try:
            self._written.write_text("Written before a run begins, and removed at once.\n")
        except OSError as error:
            self.fault = unusable(self._folder, error)
        return f"{len(home.parts)} {name}"

    def look(self, told: str, seconds: float) -> tuple[bool, bool]:
        """Whether this rank sees it, after so many seconds at most, and whether it may write there."""
        depth, _, name = told.partition(" ")
        path = Path(self._folder).absolute()
        home = Path(*path.parts[: int(depth)])
        deadline = time.monotonic() + seconds
        while not (sees := (home / name).exists()) and time.monotonic() < deadline:
            time.sleep(seconds / 20)
        return sees, may_write(home)

    def remove(self) -> None:
        if self._written is not None:
            self._written.unlink(missing_ok=True)


def describe_ranks(ranks: Sequence[int]) -> str:
    """Such as `rank 3`, `ranks 8-15` or `ranks 0-1, 4`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(texts)}"


def group_by_machine(reports: Sequence[Report], ranks: Sequence[int]) -> dict[tuple[str, str], list[int]]:
    """Host and boot -> which of these ranks run there."""
    machines: dict[tuple[str, str], list[int]] = {}
    for rank in ranks:
        machines.setdefault((reports[rank].host, reports[rank].boot), []).append(rank)
    return machines


def describe_machines(reports: Sequence[Report], ranks: Sequence[int]) -> str:
    """Such as `node-2 (ranks 8-15) and 3 more machines`."""
    machines = group_by_machine(reports, ranks)
    (host, _), first = next(iter(machines.items()))
    more = f" and {len(machines) - 1} more machine{'s' if len(machines) > 2 else ''}" if len(machines) > 1 else ""
    return f"{host} ({describe_ranks(first)}){more}"


def gather_problems(reports: Sequence[Report]) -> list[str]:
    """What the ranks found each on its own, told once, with the machine where it is not the only one."""
    places: dict[str, list[int]] = {}
    for rank, report in enumerate(reports):
        for problem in report.problems:
            places.setdefault(problem, []).append(rank)
    machines = group_by_machine(reports, range(len(reports)))
    if len(machines) == 1:
        return list(places)
    return [
        problem
        if len(group_by_machine(reports, ranks)) == len(machines)
        else f"on {describe_machines(reports, ranks)}: {problem}"
        for problem, ranks in places.items()
    ]


def find_other_versions(reports: Sequence[Report]) -> list[str]:
    """The first rank with other versions than rank 0, and these."""
    ours = reports[0].versions
    for rank, report in enumerate(reports):
        names = [name for name in {**ours, **report.versions} if report.versions.get(name) != ours.get(name)]
        if names:
            theirs, own = (
                describe_versions({name: found.get(name, "none") for name in names})
                for found in (report.versions, ours)
            )
            return [
                f"rank {rank} on {report.host} has {theirs} and rank 0 on {reports[0].host} has {own}: "
                "give all machines the same environment and the same copy of the recipe"
            ]
    return []


def find_unshared(folder: str, reports: Sequence[Report], sights: Sequence[Sight]) -> list[str]:
    """Machines that do not see the folder of the run, or must not write into it.

    Args:
        folder: job.dump_folder as rank 0 has it.
    """
    key = f"job.dump_folder={folder!r}"
    if blind := [rank for rank, sight in enumerate(sights) if not sight.sees_probe]:
        return [
            f"{key} is not shared: {describe_machines(reports, blind)} does not see what {reports[0].host} (rank 0) "
            "wrote: put it on a file system that all machines mount at the same place"
        ]
    if barred := [rank for rank, sight in enumerate(sights) if not sight.may_write]:
        return [
            f"{key} cannot be written by {describe_machines(reports, barred)}: mount it there so that this user may "
            "write, or choose another with --job.dump_folder"
        ]
    return []


def find_other_clocks(reports: Sequence[Report], sights: Sequence[Sight]) -> list[str]:
    """Machines whose clock is not rank 0's."""
    ahead = [sight.time - sights[0].time for sight in sights]
    wrong = [rank for rank, seconds in enumerate(ahead) if abs(seconds) > CLOCK_SECONDS]
    return [
        f"the clock of {describe_machines(reports, ranks)} is {abs(ahead[ranks[0]]):.0f} s "
        f"{'ahead of' if ahead[ranks[0]] > 0 else 'behind'} that of {reports[0].host} (rank 0): "
        "let all machines ask a time server, or the times in their logs mean little"
        for ranks in group_by_machine(reports, wrong).values()
    ]
