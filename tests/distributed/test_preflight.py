"""What ranks find out together before a run is built: two machines, made up of the processes of this one."""

import logging
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

import preflight
from config.parse import parse
from parallel.axes import check_axes, list_groups
from parallel.config import Comm
from parallel.degrees import Degrees
from parallel.mesh import Layout, build_layout
from tests.distributed.ranks import run_ranks

VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "code": "a1"}
NO_T5 = "encoder.t5_encoder is not there: get it"
LIMIT = 0.8  # seconds for an axis


def apart(name: str) -> Any:
    """Ranks say every word of a preflight once; inside, they can say them again."""
    store = dist.distributed_c10d._get_default_store()
    return patch.object(dist.distributed_c10d, "_get_default_store", lambda: dist.PrefixStore(name, store))


def meet(layout: Layout, name: str, folder: Path, *problems: str, **changes: Any) -> tuple[str, list[str]]:
    """What the preflight of this rank ends with, and what it tells.

    Args:
        changes: what is different on this rank, by its name in preflight.py.
    """
    told: list[str] = []
    config, _ = parse([f"--job.dump_folder={folder}"])
    with ExitStack() as stack:
        stack.enter_context(apart(name))
        stack.enter_context(
            patch.object(logging.getLogger("train"), "handle", lambda one: told.append(one.getMessage()))
        )
        for key, value in {"read_versions": lambda: VERSIONS, "SEEN_SECONDS": 0.2, **changes}.items():
            stack.enter_context(patch.object(preflight, key, value))
        try:
            preflight.check_together(config, layout, list(problems))
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}", told
    return "good", told


def meet_in_many_ways(rank: int, world_size: int, own: Path, shared: Path) -> dict[str, tuple[str, list[str]]]:
    layout = build_layout(Degrees(dp_shard=world_size), Comm(), needs_groups=False)
    logging.getLogger("train").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    second = rank >= 2
    host = "node-b" if second else "node-a"
    own = own / host
    own.mkdir(exist_ok=True)
    machine = {"this_machine": lambda: {"host": host, "boot": host}}
    other = VERSIONS | ({"torch": "2.12.1", "driver": "580.65"} if second else {})
    clock = type("clock", (), {"time": staticmethod(lambda: time.time() + (3600 if second else 0))})
    found = {
        "good": meet(layout, "good", shared / "not" / "yet" / "there", **machine),
        "not shared": meet(layout, "not shared", own, **machine),
        "a problem of one machine": meet(layout, "one", shared, *[NO_T5] * (rank == 2), **machine),
        "a problem of both": meet(layout, "both", shared, *[NO_T5] * (rank in (0, 2)), **machine),
        "versions": meet(layout, "versions", shared, read_versions=lambda: other, **machine),
        "clock": meet(layout, "clock", shared, time=clock, **machine),
        "everything": meet(layout, "everything", own, *[NO_T5] * second, read_versions=lambda: other, **machine),
    }
    with patch("os.access", lambda place, mode: not second):
        found["may not write"] = meet(layout, "may not write", shared, **machine)
    with patch.object(Path, "write_text", side_effect=OSError(28, "No space left on device")):
        found["full"] = meet(layout, "full", shared, **machine)
    return found


@pytest.fixture(scope="module")
def meetings(tmp_path_factory) -> list[dict[str, tuple[str, list[str]]]]:
    own, shared = tmp_path_factory.mktemp("own"), tmp_path_factory.mktemp("shared")
    found = run_ranks(meet_in_many_ways, 4, own, shared)
    assert list(shared.iterdir()) == [] and [file for file in own.rglob("*") if file.is_file()] == []
    return found


def ends(meetings: list[dict[str, tuple[str, list[str]]]], name: str) -> str:
    """What all ranks say alike."""
    said = {one[name][0] for one in meetings}
    assert len(said) == 1, said
    return said.pop()


def test_ranks_with_everything_in_common_go_on_and_rank_0_tells_the_versions(meetings):
    assert ends(meetings, "good") == "good"
    assert [one["good"][1] for one in meetings] == [["versions: python 3.11.7, torch 2.13.0, code a1"], [], [], []]


def test_a_run_folder_that_is_not_shared(meetings):
    said = ends(meetings, "not shared")
    assert said.startswith("ValueError: job.dump_folder=") and said.count("\n") == 0
    assert "is not shared: node-b (ranks 2-3) does not see what node-a (rank 0) wrote: put it on" in said


def test_a_folder_that_a_machine_must_not_write(meetings):
    assert "cannot be written by node-b (ranks 2-3): mount it" in ends(meetings, "may not write")


def test_a_folder_that_is_full(meetings):
    assert "must be a folder that can be made and written to, but: [Errno 28]" in ends(meetings, "full")


def test_a_problem_is_told_once_with_its_machine(meetings):
    assert ends(meetings, "a problem of one machine") == f"ValueError: on node-b (rank 2): {NO_T5}"
    assert ends(meetings, "a problem of both") == f"ValueError: {NO_T5}"


def test_other_versions_name_the_first_rank_that_has_them(meetings):
    assert ends(meetings, "versions").startswith(
        "ValueError: rank 2 on node-b has torch 2.12.1, driver 580.65 and rank 0 on node-a has torch 2.13.0, driver "
        "none: give all machines"
    )


def test_another_clock_is_a_warning(meetings):
    assert ends(meetings, "clock") == "good"
    warnings = [text for text in meetings[0]["clock"][1] if "clock" in text]
    assert len(warnings) == 1 and "the clock of node-b (ranks 2-3) is 3600 s ahead of that of node-a" in warnings[0]
    assert not [text for text in meetings[0]["good"][1] if "clock" in text]


def test_all_that_is_wrong_is_said_at_once(meetings):
    lines = ends(meetings, "everything").splitlines()
    assert len(lines) == 3 and all(
        part in line for part, line in zip((NO_T5, "torch 2.12.1", "not shared"), lines, strict=True)
    )


def try_axes(rank: int, world_size: int, axis: str, kind: str) -> str:
    """What `check_axes` says when rank 3 does something wrong along an axis of 2 x 2 ranks."""
    layout = build_layout(Degrees(dp_shard=2, tp=2), Comm(), needs_groups=False)
    groups, all_reduce = list_groups(layout), dist.all_reduce
    assert list(groups) == ["fsdp", "tp", "dp", "all"]

    def faulty(value: Any, group: Any) -> None:
        if rank == 3 and group is groups[axis]:
            if kind == "wrong":
                value += 1
            elif kind == "fails":
                raise RuntimeError("connection\nreset by peer")
            elif kind == "absent":
                time.sleep(1.5 * LIMIT)
        all_reduce(value, group=group)

    said = "good"
    if rank == 3 and kind == "silent":
        time.sleep(2.5 * LIMIT)
    else:
        try:
            with patch.object(dist, "all_reduce", faulty), patch("parallel.axes.SPARE_SECONDS", LIMIT):
                check_axes(
                    layout, ["node-a", "node-a", "node-b", "node-b"], 60.0 if kind in ("good", "wrong") else LIMIT
                )
        except RuntimeError as error:
            said = str(error)
    if kind not in ("good", "wrong"):
        dist.destroy_process_group()
    return said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axis", "kind", "message"),
    [
        ("fsdp", "good", "good"),
        ("tp", "wrong", "an all-reduce along tp, ranks 2, 3 on node-b, gave 8 instead of 7: look at the GPUs"),
        ("fsdp", "fails", "along fsdp, rank 1 on node-a, rank 3 on node-b, failed (connection reset by peer): "),
        ("dp", "absent", "along dp, rank 1 on node-a, rank 3 on node-b, did not end in time: "),
        ("fsdp", "silent", "along fsdp, rank 1 on node-a, rank 3 on node-b, did not end in time, and rank 3 on "),
    ],
)
def test_an_axis_that_does_not_work_is_named(axis, kind, message):
    ranks = run_ranks(try_axes, 4, axis, kind)
    told = ranks[:3] if kind == "silent" else ranks
    assert len(set(told)) == 1 and message in told[0], told
